"""tools/inspect_index.py shows what an index holds, ours or another's."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.inspection import inspect_index, length_histogram
from megatron_tpt.indexing.options import IndexOptions, InspectOptions

TOOL = Path(__file__).parents[2] / "tools" / "inspect_index.py"


@pytest.fixture(scope="module")
def prefix(documents: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("index") / "train"
    index(IndexOptions([documents], tokenizer_dir, prefix))
    return prefix


def test_counts_and_verification_are_shown(prefix: Path) -> None:
    result = subprocess.run([sys.executable, TOOL, prefix, "--verify"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for expected in ("2,000", "in 667 documents", "uint16", "verified: sizes"):
        assert expected in result.stdout


def test_a_document_is_decoded(prefix: Path, documents: Path, capsys: pytest.CaptureFixture) -> None:
    from megatron_tpt.records import read_records

    record = next(read_records([documents], limit=1))
    inspect_index(InspectOptions(prefix, document=0))
    shown = capsys.readouterr().out
    assert f"{record.text}<think>\n{record.thinking.strip()}\n</think><|endoftext|>" in shown
    for number in (2000, -1):
        with pytest.raises(UserError, match=f"no document {number}; they are 0 to 1999"):
            inspect_index(InspectOptions(prefix, document=number))


def test_an_index_without_manifest_is_shown_and_needs_a_tokenizer_to_decode(
    prefix: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for kind in ("bin", "idx"):
        (tmp_path / f"foreign.{kind}").write_bytes(Path(f"{prefix}.{kind}").read_bytes())
    foreign = tmp_path / "foreign"
    inspect_index(InspectOptions(foreign, verify=True))
    assert "not made by this program" in capsys.readouterr().out
    with pytest.raises(UserError, match="give --tokenizer"):
        inspect_index(InspectOptions(foreign, document=1))
    inspect_index(InspectOptions(foreign, document=1, tokenizer=tokenizer_dir))
    assert "<|endoftext|>" in capsys.readouterr().out


def test_another_tokenizer_is_refused(prefix: Path, word_tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="another tokenizer"):
        inspect_index(InspectOptions(prefix, document=1, tokenizer=word_tokenizer_dir))


def test_lengths_are_counted_between_powers_of_two() -> None:
    lengths = numpy.array([2, 3, 4, 7, 8, 31])
    assert length_histogram(lengths) == [(2, 3, 2), (4, 7, 2), (8, 15, 1), (16, 31, 1)]
    assert length_histogram(numpy.array([0, 1])) == [(0, 0, 1), (1, 1, 1)]
