"""A checkpoint as a Hugging Face folder, which transformers and vLLM load without code of ours.

The weights are read and written tensor by tensor, so that memory holds one safetensors file (5 GB) at most.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tpt.config.load import read_yaml, recipe_from_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory
from megatron_tpt.indexing.tokenizer import copy_tokenizer
from megatron_tpt.interop.checkpoint_reader import CheckpointReader
from megatron_tpt.interop.hf_config import to_hf_config
from megatron_tpt.interop.mapping import places
from megatron_tpt.interop.options import ExportOptions
from megatron_tpt.interop.special_ids import begin_and_end_ids

MAX_FILE_BYTES = 5_000_000_000


def export_hf(options: ExportOptions) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer, all of it or nothing.

    Raises UserError when the checkpoint is none, its model has no Hugging Face counterpart, or the output exists.
    """
    refuse_existing(options.output)
    checkpoint = options.checkpoint.resolve()  # `latest` may move on meanwhile
    model = read_model_config(checkpoint)
    reader = CheckpointReader(checkpoint)
    tokenizer = checkpoint / "tokenizer"
    with atomic_directory(options.output) as folder:
        copy_tokenizer(tokenizer, folder)
        bos_id, eos_id = begin_and_end_ids(tokenizer)
        dtype = getattr(torch, options.dtype) if options.dtype else reader.dtype("embedding.word_embeddings.weight")
        config = to_hf_config(model, dtype=str(dtype).removeprefix("torch."), bos_id=bos_id, eos_id=eos_id)
        _write_json(folder / "config.json", config)
        ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        _write_json(folder / "generation_config.json", {name: id for name, id in ids.items() if id is not None})
        num_parameters = write_safetensors(folder, hf_tensors(model, reader, dtype))
    print(f"{options.output}: {config['architectures'][0]}, {num_parameters:,} parameters in {config['torch_dtype']}")


def refuse_existing(output: Path) -> None:
    """Raises UserError when `output` is there already and not an empty folder."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already: give another --output, or remove it")


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model of a checkpoint, from the recipe kept with it. Raises UserError when there is none."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{checkpoint} is no checkpoint (no recipe.yaml): give a folder like RUN/checkpoints/latest")
    model = recipe_from_dict(Recipe, {"model": read_yaml(path).get("model", {})}).model
    if model.vocab_size is None:
        raise UserError(f"{path}: model.vocab_size is missing: give the number of tokens of the checkpoint's tokenizer")
    return model


def hf_tensors(model: ModelConfig, reader: CheckpointReader, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the Hugging Face model, one after another, with its name."""
    for row, layer in places(model):
        stacked = () if layer is None else (model.num_layers,)
        if reader.shape(row.megatron) != (*stacked, *row.megatron_shape):
            raise UserError(
                f"{reader.folder}: {row.megatron} has shape {list(reader.shape(row.megatron))}, its recipe.yaml "
                f"describes {[*stacked, *row.megatron_shape]}: this recipe.yaml belongs to another checkpoint"
            )
        parts = row.transform.split(reader.read(row.megatron, layer))
        for name, part in zip(row.hugging_face, parts, strict=True):
            yield name.format(layer=layer), part.to(dtype).contiguous()


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
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": num_bytes}, "weight_map": index}
        )
    return num_parameters


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
