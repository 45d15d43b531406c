"""Cuts a pretrained model into prelude, recurrent layers and coda (arXiv 2511.07384), as a checkpoint to start from.

The first layers become the prelude, the last ones the coda, those just before it the recurrent layers; all others are
dropped. New is the adapter alone, [h, 2 h], which every iteration reads the state and the embeddings through.
"""

import dataclasses
import json
from pathlib import Path

import torch

from megatron_tpt.errors import UserError
from megatron_tpt.files import real_path
from megatron_tpt.interop.checkpoint_reader import CheckpointReader
from megatron_tpt.interop.checkpoint_writer import Reader, Source, sharded_tensors, write_checkpoint
from megatron_tpt.interop.hf_export import read_model_config, refuse_existing
from megatron_tpt.interop.hf_import import open_model
from megatron_tpt.interop.options import RetrofitOptions
from megatron_tpt.json_data import pretty
from megatron_tpt.logs import print_result
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.recurrent.config import ADAPTER_KEY, RecurrentConfig
from megatron_tpt.training.checkpoint_files import checkpoint_named, refuse_damaged
from megatron_tpt.training.model_files import GENERATION_CONFIG, HF_CONFIG, HISTORY

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def retrofit(options: RetrofitOptions) -> None:
    """Write the checkpoint, all of it or nothing. Raises UserError when the parent is none, when the split does not fit
    it, or when the output exists."""
    refuse_existing(options.output)
    parent = open_model(options.model) if (options.model / "config.json").is_file() else _open_checkpoint(options.model)
    if not isinstance(parent.model, GPTConfig) or isinstance(parent.model, RecurrentConfig):
        raise UserError(f"{options.model} is of model.family={parent.model.family}: give a model of the family gpt")
    split, layers = _selected_layers(options, parent.model.num_layers)
    fields = {field.name: getattr(parent.model, field.name) for field in dataclasses.fields(GPTConfig)}
    fields |= {"num_layers": len(layers), "tie_embeddings": False, "preset": None}
    model = GPTConfig(**fields)
    if not (options.static or options.untie):
        fields |= {"family": "recurrent", "prelude_layers": split[0], "coda_layers": split[2]}
        model = RecurrentConfig(**fields)
    read = _pruned(parent, layers, options)
    write_checkpoint(options.output, model, sharded_tensors(model, read), parent.tokenizer, _files(parent, layers))
    dropped = [str(layer) for layer in range(parent.model.num_layers) if layer not in layers]
    parts = f"layers {', '.join(map(str, layers))}"
    if isinstance(model, RecurrentConfig):
        p, c = split[0], split[0] + split[1]
        names = [", ".join(map(str, part)) or "none" for part in (layers[:p], layers[p:c], layers[c:])]
        parts = f"prelude {names[0]}; recurrent {names[1]}; coda {names[2]}"
    print_result(f"{options.output}: {model.num_parameters():,} parameters from {options.model}")
    print_result(f"{options.output}: {parts}; dropped {', '.join(dropped) or 'none'}")
    for note in parent.notes:
        print_result(f"{options.output}: {note}")


def _open_checkpoint(name: Path) -> Source:
    folder = real_path(checkpoint_named(name))
    model = read_model_config(folder)
    refuse_damaged(folder)
    tokenizer = folder / "tokenizer"
    files = {
        file: (folder / file).read_bytes()
        for file in (GENERATION_CONFIG, HF_CONFIG, HISTORY)
        if (folder / file).is_file()
    }
    read = CheckpointReader(folder).read
    return Source(model, read, tokenizer if tokenizer.is_dir() else None, files, [])


def _files(parent: Source, layers: list[int]) -> dict[str, bytes]:
    """The parent's files; what its config.json says of every layer is said of those that are left."""
    files = dict(parent.files)
    if HF_CONFIG in files:
        config = json.loads(files[HF_CONFIG])
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = [config["layer_types"][layer] for layer in layers]
        files[HF_CONFIG] = pretty(config)
    return files


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--{option} {text}: give numbers with commas between them, such as 4,8,4") from None


def _selected_layers(options: RetrofitOptions, num_layers: int) -> tuple[list[int], list[int]]:
    """(layers of prelude, recurrence and coda; the parent's numbers of all of them, in their order)."""
    if options.adapter is not None and (options.static or options.untie):
        raise UserError("--adapter is for a recurrent model: omit it, or --static and --untie")
    if options.seed is not None and (options.static or options.untie or options.adapter in ("identity", "add")):
        raise UserError("--seed is for a random adapter, and this model has none: omit it")
    if options.untie:
        if options.split or options.layers or options.static:
            raise UserError("--untie keeps all layers: omit --split, --layers and --static")
        return [], list(range(num_layers))
    if not options.split:
        raise UserError("give --split, such as --split 4,8,4: layers of prelude, recurrence and coda")
    split = _numbers("split", options.split)
    if len(split) != 3 or min(split) < 0 or split[1] < 1:
        raise UserError(f"--split {options.split}: give three numbers, the second one at least 1, such as 4,8,4")
    total = sum(split)
    if options.layers:
        layers = _numbers("layers", options.layers)
        if len(layers) != total or not all(0 <= layer < num_layers for layer in layers):
            raise UserError(
                f"--layers {options.layers}: give {total} numbers, as --split says, from 0 to {num_layers - 1}"
            )
        return split, layers
    if total > num_layers:
        raise UserError(f"--split {options.split} takes {total} layers, and {options.model} has {num_layers}: lower it")
    return split, [*range(split[0]), *range(num_layers - split[1] - split[2], num_layers)]


def _pruned(parent: Source, layers: list[int], options: RetrofitOptions) -> Reader:
    """Reads the weights of the new model from those of the parent."""

    def read(key: str, layer: int | None) -> torch.Tensor:
        if key == ADAPTER_KEY:
            adapter = initial_adapter(options.adapter or "random", parent.model.hidden_size, options.seed or 0)
            return adapter.to(parent.read(_EMBEDDING, None).dtype)
        if key == _OUTPUT and parent.model.tie_embeddings:
            return parent.read(_EMBEDDING, None).clone()
        return parent.read(key, None if layer is None else layers[layer])

    return read


def initial_adapter(kind: str, width: int, seed: int) -> torch.Tensor:
    """The matrix A, fp32 [h, 2 h], of x = A [state; embedding]: torch's default for linear layers, uniform within
    1 / sqrt(2 h), as in the authors' code (random); x = embedding (identity); or x = state + embedding (add)."""
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(width, 2 * width).uniform_(-((2 * width) ** -0.5), (2 * width) ** -0.5, generator=generator)
    one = torch.eye(width)
    return torch.cat((one if kind == "add" else torch.zeros_like(one), one), dim=1)
