"""Hugging Face models with a tokenizer, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_models import VOCAB_SIZE, save_hf_model
from recurrent_exports import export_retrofit

from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ImportOptions
from megatron_tpt.records import Record, write_records


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_records(folder / "text.jsonl", [Record(str(i), f"the {i} quick brown foxes") for i in range(100)])
    options = TrainTokenizerOptions(
        input=[folder / "text.jsonl"], output=folder / "tokenizer", vocab_size=VOCAB_SIZE - 20
    )
    return train_tokenizer(options)


@pytest.fixture(scope="session")
def hf_folder(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """hf_folder(name) is the folder of one of hf_models.CONFIGS."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = save_hf_model(name, tmp_path_factory.mktemp("models") / name, tokenizer)
        return folders[name]

    return get


@pytest.fixture(scope="session")
def imported(hf_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """imported(name) is the checkpoint that such a model was imported as."""

    def get(name: str) -> Path:
        source = hf_folder(name)
        checkpoint = source.with_name(f"{name}-checkpoint")
        if not checkpoint.exists():
            import_hf(ImportOptions(source, checkpoint))
        return checkpoint

    return get


@pytest.fixture(scope="session")
def exported(hf_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """exported(name) is the export of a retrofit of such a model."""
    return lambda name: export_retrofit(hf_folder(name))
