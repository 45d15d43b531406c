"""A checkpoint as a Hugging Face folder, which transformers and vLLM load without our code, or with the code in it.

The weights are read and written tensor by tensor, so that memory holds one safetensors file (5 GB) at most.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tpt.config.load import read_yaml, recipe_from_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory, real_path
from megatron_tpt.indexing.tokenizer import CONFIG, copy_tokenizer
from megatron_tpt.interop.checkpoint_reader import CheckpointReader
from megatron_tpt.interop.hf_config import adapter_of, to_hf_config
from megatron_tpt.interop.options import ExportOptions
from megatron_tpt.interop.special_ids import eos_token_of_chats, exported_settings, set_eos_token
from megatron_tpt.json_data import pretty, read_object
from megatron_tpt.logs import print_result
from megatron_tpt.training.checkpoint_files import checkpoint_named, refuse_damaged
from megatron_tpt.training.model_files import (
    GENERATION_CONFIG,
    HF_CONFIG,
    History,
)

MAX_FILE_BYTES = 5_000_000_000
_LIMITS = {"model_max_length", "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "seq_len"}


def export_hf(options: ExportOptions) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer, all of it or nothing.

    Raises UserError when the checkpoint is none, its model has no Hugging Face counterpart, or the output exists.
    """
    refuse_existing(options.output)
    checkpoint = real_path(checkpoint_named(options.checkpoint))  # `latest` may point elsewhere meanwhile
    refuse_damaged(checkpoint)
    model, notes = _with_trained_context(read_model_config(checkpoint), checkpoint)
    adapter, reader = adapter_of(model), CheckpointReader(checkpoint)
    token_ids, generation = exported_settings(checkpoint)
    eos_token = eos_token_of_chats(checkpoint)
    with atomic_directory(options.output) as folder:
        copy_tokenizer(checkpoint / "tokenizer", folder)
        if eos_token is not None:
            set_eos_token(folder, eos_token)
            notes.append(f"eos_token of the tokenizer is {eos_token}, which ends a turn of the chats it was tuned on")
        dtype = getattr(torch, options.dtype) if options.dtype else reader.dtype(adapter.rows(model)[0].weight.key)
        config = to_hf_config(
            model,
            dtype=str(dtype).removeprefix("torch."),
            token_ids=token_ids,
            original=read_object(checkpoint / HF_CONFIG),
        )
        _raise_limits(config, folder, History.read(checkpoint).longest_sequence)
        (folder / "config.json").write_bytes(pretty(config))
        (folder / GENERATION_CONFIG).write_bytes(pretty(generation))
        num_parameters = write_safetensors(folder, hf_tensors(model, reader, dtype))
        for path in adapter.code:
            shutil.copyfile(path, folder / path.name)
    print_result(
        f"{options.output}: {config['architectures'][0]}, {num_parameters:,} parameters in {config['torch_dtype']}"
    )
    for note in notes:
        print_result(f"{options.output}: {note}")


def _with_trained_context(model: ModelConfig, checkpoint: Path) -> tuple[ModelConfig, list[str]]:
    """The model with a context that covers the longest sequence it was trained on, and a note about it."""
    trained, said = History.read(checkpoint).longest_sequence, model.max_position_embeddings
    if trained > said:
        note = f"max_position_embeddings is {trained}, the longest training.sequence_length; the recipe says {said}"
        return dataclasses.replace(model, max_position_embeddings=trained), [note]
    if 0 < trained < said and not (checkpoint / HF_CONFIG).is_file():
        return model, [
            f"max_position_embeddings is {said}, as in the recipe; no longer sequence than {trained} was seen"
        ]
    return model, []


def _raise_limits(config: dict[str, Any], folder: Path, trained: int) -> None:
    """Raise what limits the context below the longest sequence that was trained, in config.json and in the tokenizer's
    folder: vLLM takes the smallest."""
    settings = read_object(folder / CONFIG)
    for fields in (config, settings):
        low = [name for name in _LIMITS & fields.keys() if isinstance(fields[name], int) and fields[name] < trained]
        fields |= dict.fromkeys(low, trained)
        if low and fields is settings:
            (folder / CONFIG).write_bytes(pretty(settings))


def refuse_existing(output: Path) -> None:
    """Raises UserError when `output` is there already and not an empty folder."""
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already: give another --output, or remove it")


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model of a checkpoint, from the recipe kept with it. Raises UserError when there is none."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a checkpoint (no recipe.yaml): give a folder like RUN/checkpoints/latest")
    model = recipe_from_dict(Recipe, {"model": read_yaml(path).get("model")}).model
    if model.vocab_size is None:
        raise UserError(f"{path}: model.vocab_size is missing: give the number of tokens of the checkpoint's tokenizer")
    return model


def hf_tensors(model: ModelConfig, reader: CheckpointReader, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the Hugging Face model, one after another, with its name."""
    adapter = adapter_of(model)
    for row, layer in adapter.places(model):
        key = row.weight.key
        shape = (*(() if layer is None else (model.num_layers,)), *row.weight.shape)
        if reader.shape(key) != shape:
            raise UserError(
                f"{reader.folder}: {key} has shape {list(reader.shape(key))}, its recipe.yaml describes {list(shape)}: "
                f"this recipe.yaml belongs to another checkpoint"
            )
        parts = row.transform.split(reader.read(key, layer))
        for name, part in zip(adapter.names(model, row, layer), parts, strict=True):
            yield name, part.to(dtype).contiguous()


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_file_bytes: int = MAX_FILE_BYTES
) -> int:
    """Write model.safetensors, or several files and an index when it gets too big. Returns the number of parameters."""
    weight_map: dict[str, int] = {}
    batch: dict[str, torch.Tensor] = {}
    num_files = num_parameters = num_bytes = batch_bytes = 0

    def flush() -> None:
        nonlocal num_files, batch_bytes
        num_files, batch_bytes = num_files + 1, 0
        save_file(batch, folder / f"{num_files}.safetensors", metadata={"format": "pt"})
        batch.clear()

    for name, tensor in tensors:
        if batch and batch_bytes + tensor.nbytes > max_file_bytes:
            flush()
        batch[name], weight_map[name] = tensor, num_files + 1
        batch_bytes += tensor.nbytes
        num_bytes += tensor.nbytes
        num_parameters += tensor.numel()
    flush()
    names = [f"model-{i:05}-of-{num_files:05}.safetensors" for i in range(1, num_files + 1)]
    if num_files == 1:
        names = ["model.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    for i, name in enumerate(names, start=1):
        path = (folder / f"{i}.safetensors").rename(folder / name)
        path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner reads
    if num_files > 1:
        index = {name: names[i - 1] for name, i in weight_map.items()}
        content = {"metadata": {"total_size": num_bytes}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_bytes(pretty(content))
    return num_parameters
