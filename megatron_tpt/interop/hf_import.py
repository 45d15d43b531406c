"""A Hugging Face folder as a checkpoint that any parallel layout starts from (training.init_from).

The weights keep their precision and are in memory once, all together.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tpt import platform
from megatron_tpt.logs import print_result
from megatron_tpt.names import first_few
from megatron_tpt.units import GIB

# Megatron Core comes after the platform.
# isort: split
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.files import atomic_directory, free_space
from megatron_tpt.indexing.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer
from megatron_tpt.interop.hf_config import adapter_for
from megatron_tpt.interop.hf_export import refuse_existing
from megatron_tpt.interop.options import ImportOptions
from megatron_tpt.json_data import pretty, read_object
from megatron_tpt.models.hugging_face import HuggingFaceAdapter
from megatron_tpt.training.checkpoint_files import write_checksums
from megatron_tpt.training.model_files import GENERATION_CONFIG, HF_CONFIG, HISTORY, History

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

_AGAIN = "download the model again"


def import_hf(options: ImportOptions) -> None:
    """Write the weights, recipe.yaml with the model's shape, tokenizer/ and the settings of the model; all of it or
    nothing. What is not carried over is named.

    Raises UserError when the folder is no complete model of a supported kind, or when the output exists.
    """
    refuse_existing(options.output)
    config_path = options.model / "config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path}: no such file: give a Hugging Face model folder")
    config = read_object(config_path, _AGAIN)
    try:
        adapter = adapter_for(config, config_path)
        model = adapter.from_config(config, config_path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # foreign files may be anything
        raise UserError(f"{config_path}: damaged: a field has a value of a wrong type ({one_line(error)})") from error
    tensors = HfTensors(options.model, adapter)
    model, notes = tensors.settle_tying(model)
    tensors.check_names(model)
    Tokenizer(options.model)  # refuses one that training could not use
    generation = read_object(options.model / GENERATION_CONFIG, _AGAIN)
    with atomic_directory(options.output) as folder, platform.process_groups(ParallelConfig()):
        _save(sharded_tensors(model, tensors), folder, options.output)
        copy_tokenizer(options.model, folder / "tokenizer")
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": to_dict(model)}, sort_keys=False))
        (folder / HF_CONFIG).write_bytes(pretty(config))
        if generation:
            (folder / GENERATION_CONFIG).write_bytes(pretty(generation))
        (folder / HISTORY).write_bytes(pretty(dataclasses.asdict(History())))
        write_checksums(folder)
    print_result(f"{options.output}: {model.num_parameters():,} parameters from {options.model}")
    for note in [*notes, *adapter.notes(config), *_not_carried(options.model, tensors)]:
        print_result(f"{options.output}: {note}")


def _save(tensors: dict[str, Any], folder: Path, output: Path) -> None:
    try:
        dist_checkpointing.save(tensors, str(folder))
    except CheckpointException as error:  # a separate process wrote, and reports no error number
        reason = " ".join(str(error).split())[-300:]
        free = free_space(folder)[1] / GIB
        raise UserError(
            f"{output}: could not be written ({reason}): make room, {free:.1f} GiB are free there"
        ) from error


def _not_carried(folder: Path, tensors: "HfTensors") -> list[str]:
    """Lines about the files of a model's folder that an import does not read."""
    read = {"config.json", GENERATION_CONFIG, *TOKENIZER_FILES, *tensors.files}
    others = sorted(path.name for path in folder.iterdir() if path.name not in read and not path.name.startswith("."))
    adapters = [name for name in others if name.startswith("adapter_")]
    lines = []
    if adapters:
        lines.append(
            f"warning: {', '.join(adapters)}: an adapter is not part of the imported weights: merge it into the model "
            f"and import that, if it is to count"
        )
    if rest := [name for name in others if name not in adapters]:
        lines.append(f"not carried over: {first_few(rest, 20)}")
    return lines


class HfTensors:
    """The tensors in a folder's safetensors files, by name.

    Raises UserError when there are none, or when a file is not what it should be.
    """

    def __init__(self, folder: Path, adapter: HuggingFaceAdapter[Any]) -> None:
        self.folder, self.adapter = folder, adapter
        self._open_files: dict[str, Any] = {}
        self._source_of: dict[str, str] = {}  # names under which tensors are stored, where these are others
        self._file_of = self._find_files()

    def _find_files(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_object(index, _AGAIN).get("weight_map")
            if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
                raise UserError(f"{index}: weight_map does not name files next to it: {_AGAIN}")
            return weight_map
        if (self.folder / "model.safetensors").is_file():
            return dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        if any(self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder} has pickled weights only (.bin), which can run code when loaded: get the model's "
                f"safetensors files, or save it again with save_pretrained of transformers"
            )
        raise UserError(f"{self.folder} has no model.safetensors, nor an index of several: {_AGAIN}")

    def _open(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder / name} is not readable ({error}): {_AGAIN}") from None
        return self._open_files[name]

    @property
    def files(self) -> set[str]:
        """The files that hold the tensors, and their index."""
        return {*self._file_of.values(), "model.safetensors.index.json"}

    def settle_tying(self, model: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """The model with its embeddings tied or not as transformers 5 does it, and a note about it.

        It depends on the tensors: two that differ are not tied, whatever config.json says; of two that are tied
        either may be missing.
        """
        embedding, output = self.adapter.embedding_name, self.adapter.output_name
        if not model.tie_embeddings or output not in self._file_of:
            return model, []
        if embedding not in self._file_of:
            self._source_of[embedding] = output
            self._file_of[embedding] = self._file_of.pop(output)
            return model, [f"{embedding} is missing: the tied {output} is taken for both"]
        first, second = (self._open(self._file_of[name]).get_tensor(name) for name in (embedding, output))
        if first.dtype != second.dtype:
            first, second = first.float(), second.float()
        if torch.equal(first, second):
            return model, []
        note = f"{output} differs from {embedding}: not tied, as in transformers 5, although tie_word_embeddings is set"
        return dataclasses.replace(model, tie_embeddings=False), [note]

    def check_names(self, model: ModelConfig) -> None:
        """Raises UserError unless there are the tensors of `model`, and no others that would matter."""
        expected = {name.format(layer=layer) for row, layer in self.adapter.places(model) for name in row.names}
        if missing := sorted(expected - set(self._file_of)):
            raise UserError(f"{self.folder}: {len(missing)} tensors are missing ({missing[0]}): is it complete?")
        unused = {self.adapter.output_name} if model.tie_embeddings else set()
        unknown = sorted(
            name for name in set(self._file_of) - expected - unused if not name.endswith(".rotary_emb.inv_freq")
        )
        if unknown:
            raise UserError(f"{self.folder}: tensor {unknown[0]} is not supported: config.json describes no such part")

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor. Raises UserError when its shape is another."""
        tensor = self._open(self._file_of[name]).get_tensor(self._source_of.get(name, name))
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(
                f"{self.folder}: {name} is in {str(tensor.dtype).removeprefix('torch.')}, only float32, bfloat16 and "
                f"float16 are supported: save the model in one of these"
            )
        if tensor.shape != shape:
            raise UserError(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, config.json describes {list(shape)}: they are "
                f"of different models"
            )
        return tensor


def sharded_tensors(model: ModelConfig, tensors: HfTensors) -> dict[str, ShardedTensor]:
    """All weights as Megatron Core's checkpoints name and stack them."""
    state = {}
    for row, layer in tensors.adapter.places(model):
        parts = [tensors.read(name.format(layer=layer), shape) for name, shape in row.shapes.items()]
        tensor = row.transform.join(parts).contiguous()
        place = [] if layer is None else [(0, layer, model.num_layers)]
        state[f"{row.weight.key} {layer}"] = ShardedTensor.from_rank_offsets(
            row.weight.key, tensor, *place, prepend_axis_num=len(place)
        )
    return state
