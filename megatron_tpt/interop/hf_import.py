"""A Hugging Face folder as a checkpoint that any parallel layout starts from (training.init_from).

The weights keep their precision and are in memory once, all together.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_tpt.config.model import ModelConfig
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.indexing.tokenizer import TOKENIZER_FILES, Tokenizer
from megatron_tpt.interop.checkpoint_writer import Reader, Source, sharded_tensors, write_checkpoint
from megatron_tpt.interop.hf_config import adapter_for
from megatron_tpt.interop.hf_export import refuse_existing
from megatron_tpt.interop.options import ImportOptions
from megatron_tpt.json_data import pretty, read_object
from megatron_tpt.logs import print_result
from megatron_tpt.models.hugging_face import HuggingFaceAdapter
from megatron_tpt.names import counted, first_few
from megatron_tpt.training.model_files import GENERATION_CONFIG, HF_CONFIG, HISTORY, History

logger = logging.getLogger(__name__)

_AGAIN = "download the model again"


def import_hf(options: ImportOptions) -> None:
    """Write the weights, recipe.yaml with the model's shape, tokenizer/ and the settings of the model; all of it or
    nothing. What is not carried over is named.

    Raises UserError when the folder is no complete model of a supported kind, or when the output exists.
    """
    refuse_existing(options.output)
    source = open_model(options.model)
    output = options.output
    write_checkpoint(output, source.model, sharded_tensors(source.model, source.read), source.tokenizer, source.files)
    print_result(f"{output}: {source.model.num_parameters():,} parameters from {options.model}")
    for note in source.notes:
        print_result(f"{output}: {note}")


def open_model(folder: Path) -> Source:
    """A Hugging Face folder as the source of a checkpoint. Raises UserError when it is no complete model of a supported
    kind."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path}: no such file: give a Hugging Face model folder")
    config = read_object(config_path, _AGAIN)
    try:
        adapter = adapter_for(config, config_path)
        model = adapter.from_config(config, config_path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # foreign files may be anything
        raise UserError(f"{config_path}: damaged: a field has a value of a wrong type ({one_line(error)})") from error
    tensors = HfTensors(folder, adapter)
    model, notes = tensors.settle_tying(model)
    tensors.check_names(model)
    Tokenizer(folder)  # refuses one that training could not use
    generation = read_object(folder / GENERATION_CONFIG, _AGAIN)
    files = {HF_CONFIG: pretty(config), HISTORY: pretty(dataclasses.asdict(History()))}
    if generation:
        files[GENERATION_CONFIG] = pretty(generation)
    notes += [*adapter.notes(config), *_not_carried(folder, tensors)]
    return Source(model, tensors.reader_of(model), folder, files, notes)


def _not_carried(folder: Path, tensors: "HfTensors") -> list[str]:
    """Notes on the files of a model's folder that are not read; warns where they may have been meant to count."""
    read = {"config.json", GENERATION_CONFIG, *TOKENIZER_FILES, *tensors.files}
    read |= {path.name for path in tensors.adapter.code}  # exported again from this package
    others = sorted(path.name for path in folder.iterdir() if path.name not in read and not path.name.startswith("."))
    adapters = [name for name in others if name.startswith("adapter_")]
    if adapters:
        logger.warning(
            f"{folder}: {', '.join(adapters)}: an adapter is not part of the imported weights: merge it into the model "
            f"and import that, if it is to count"
        )
    rest = [name for name in others if name not in adapters]
    return [f"not carried over: {first_few(rest, 20)}"] if rest else []


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
        adapter = self.adapter
        expected = {name for row, layer in adapter.places(model) for name in adapter.names(model, row, layer)}
        if missing := sorted(expected - set(self._file_of)):
            raise UserError(f"{self.folder}: lacks {counted(len(missing), 'tensor')} ({missing[0]}): is it complete?")
        unused = {self.adapter.output_name} if model.tie_embeddings else set()
        unknown = sorted(
            name for name in set(self._file_of) - expected - unused if not name.endswith(".rotary_emb.inv_freq")
        )
        if unknown:
            raise UserError(f"{self.folder}: tensor {unknown[0]} is not supported: config.json describes no such part")

    def reader_of(self, model: ModelConfig) -> Reader:
        """Reads the tensors as Megatron Core has them, by key and layer."""
        rows = {row.weight.key: row for row in self.adapter.rows(model)}

        def read(key: str, layer: int | None) -> torch.Tensor:
            row = rows[key]
            names = self.adapter.names(model, row, layer)
            return row.transform.join([self.read(*one) for one in zip(names, row.shapes.values(), strict=True)])

        return read

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
