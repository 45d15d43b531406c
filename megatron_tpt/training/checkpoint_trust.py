"""Opening a checkpoint never runs code from it, whoever wrote it.

torch.distributed.checkpoint stores a checkpoint's metadata as a pickle (`.metadata`), and a pickle may call any
function when it is loaded. So it is first read by an unpickler that only allows the few types that such metadata
consists of. The objects in the other files are read by torch's restricted unpickler (`weights_only`), which `platform`
turns on for the whole process.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tpt.errors import UserError

METADATA = ".metadata"

_TYPES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
}


def not_a_checkpoint(folder: Path) -> UserError:
    """What to raise for another folder."""
    return UserError(f"{folder} is not a checkpoint: give a folder like RUN/checkpoints/latest")


class _Forbidden(Exception):
    """The name of a type or function that a pickle refers to and that is not allowed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _TYPES.get(module, ()):
            return super().find_class(module, name)
        raise _Forbidden(f"{module}.{name}")


def require_data_only(folder: Path) -> None:
    """Raises UserError when the metadata of a checkpoint cannot be read, refers to more than data, or names files
    outside the folder.

    Call it before anything else opens the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            description = _MetadataUnpickler(file).load()
        for place in description.storage_data.values():
            if place.relative_path == ".." or PurePath(place.relative_path).name != place.relative_path:
                raise UserError(f"{path} names {place.relative_path!r}, which is no file of this folder: it is refused")
    except UserError:
        raise
    except OSError:
        raise not_a_checkpoint(folder) from None
    except _Forbidden as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint consists of: it could run code, and is refused. Get the "
            f"checkpoint from its author again, or its weights as safetensors (tools/import_hf.py)"
        ) from None
    # A damaged pickle can raise nearly anything; none of it has run code from outside the types above.
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): give another checkpoint") from None


@contextmanager
def objects_as_data(folder: Path) -> Iterator[None]:
    """Within the block, raises UserError when torch refuses an object in a checkpoint because it is not plain data."""
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        refused = [error, *error.failures.values()] if isinstance(error, CheckpointException) else [error]
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in refused]
        if not any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            raise
        raise UserError(
            f"{folder} holds an object that is not data, or is damaged: it could run code, and is refused. Get the "
            f"checkpoint from its author again, or its weights as safetensors (tools/import_hf.py)"
        ) from None
