"""Reads single tensors, whole, from a checkpoint that any parallel layout wrote: one process, no process groups."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tpt.errors import UserError, failure, one_line
from megatron_tpt.training.checkpoint_trust import require_data_only


class _IntoOneTensor(DefaultLoadPlanner):
    """Copies every piece that the reader finds to its place in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target


class CheckpointReader:
    """The weights of a checkpoint folder, tensor by tensor.

    Raises UserError when the folder is no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require_data_only(folder)
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.folder} holds no tensor {key}: its recipe.yaml does not describe its weights")
        return entry

    def shape(self, key: str) -> torch.Size:
        """Shape of the whole tensor, over all layers and all ranks."""
        return self._entry(key).size

    def dtype(self, key: str) -> torch.dtype:
        """Precision of the stored tensor."""
        return self._entry(key).properties.dtype

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """The tensor stored under `key`; of one that stacks all layers, that of `layer` without the leading axis."""
        entry = self._entry(key)
        start = [0] * len(entry.size)
        size = list(entry.size)
        if layer is not None:
            start[0], size[0] = layer, 1
        wanted = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise ValueError(f"{self.folder}: parts of {key} are missing")
        tensor = torch.empty(size, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _IntoOneTensor(tensor)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            message = f"{self.folder}: damaged: {key} cannot be read ({one_line(error)}); copy it again"
            raise failure(message, error) from error
        return tensor if layer is None else tensor[0]
