"""What a job would cost, from a sample that is much smaller than its input."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from augment_runs import options_for, write_documents
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, write_records
from megatron_tpt.thinking import input_sample
from megatron_tpt.thinking.estimate import estimate
from megatron_tpt.thinking.job import plan
from megatron_tpt.thinking.options import AugmentOptions

KIB = 1 << 10
type Options = Callable[..., AugmentOptions]


@pytest.fixture(scope="module")
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


@pytest.fixture
def options_of(server: UnrulyServer, tmp_path: Path) -> Options:
    """Makes the options of an estimate from 100 documents of an input."""
    template = tmp_path / "bare.txt"
    template.write_text("{document}")

    def make(source: Path | str, **changes: Any) -> AugmentOptions:
        settings: dict[str, Any] = {"engine": "endpoint", "api": "chat", "endpoints": [server.url]}
        settings |= {"prompt": str(template), "max_document_tokens": 4096, "estimate": 100}
        options = options_for(Path("in"), MODEL, tmp_path / "out", **settings | changes)
        return dataclasses.replace(options, input=[str(source)])

    return make


def texts(number: int, length: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"ok 0 {chance.randbytes(length // 2).hex()}" for _ in range(number)]


def write_rows(path: Path, rows: list[str]) -> None:
    if path.suffix == ".jsonl":
        write_documents(path, ({"text": text} for text in rows))
    else:
        write_records(path, (Record(str(i), text) for i, text in enumerate(rows)))


def test_a_small_sample_of_files_with_documents_of_all_lengths_finds_the_totals(
    options_of: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_sample, "_MAX_BYTES", 512 * KIB)
    parts = {
        "a.jsonl": texts(200, 8000),
        "b.jsonl": texts(8000, 100),
        "c.parquet": texts(2000, 500),
        # Long documents first: the beginning of a file says little of its rest.
        "d.jsonl": texts(50, 20_000) + texts(4000, 50),
        "e.jsonl.zst": texts(2000, 1500),
    }
    for name, rows in parts.items():
        write_rows(tmp_path / "in" / name, rows)
    everything = [text for rows in parts.values() for text in rows]
    guess = estimate(options_of(tmp_path / "in", estimate=400))
    assert not guess.is_counted and guess.num_sampled == 400
    assert guess.documents == pytest.approx(len(everything), rel=0.1)
    true_tokens = sum(-(-len(text) // 4) for text in everything)
    assert guess.documents * guess.document_tokens.mean == pytest.approx(true_tokens, rel=0.2)
    assert "drawn from 128 stretches all over the files; the beginning of 1 of 1 packed files" in guess.summary()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_documents_of_one_length_are_estimated_almost_exactly(
    options_of: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(input_sample, "_MAX_BYTES", 2048 * KIB)
    for i in range(3):
        write_rows(tmp_path / "in" / f"{i}{suffix}", texts(2000, 2500, seed=i))
    guess = estimate(options_of(tmp_path / "in"))
    assert not guess.is_counted
    assert guess.documents == pytest.approx(6000, rel=0.02)


def test_a_packed_file_that_is_read_whole_is_counted_to_its_last_row(options_of: Options, tmp_path: Path) -> None:
    line = b'{"text": "ok 0 the same"}\n'
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(line * 30_000))  # some hundred rows in a packed byte
    guess = estimate(options_of(tmp_path / "in.jsonl.zst", estimate=5))
    assert (guess.documents, guess.is_counted) == (30_000, True)


def test_a_row_of_any_place_can_be_drawn(options_of: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_sample, "_MAX_BYTES", 64 * KIB)
    write_rows(tmp_path / "in.jsonl", [f"ok 0 {i:05d} {'x' * 100}" for i in range(10_000)])
    job = input_sample.draw_rows(plan(options_of(tmp_path / "in.jsonl")), 200)
    drawn = sorted(int(row.record.text.split()[2]) for _, row in job.rows if row.record)
    assert len(set(drawn)) == 200
    for tenth in range(10):
        assert 8 <= sum(number // 1000 == tenth for number in drawn) <= 36


def test_the_limit_is_all_there_is(options_of: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", texts(50, 20))
    write_rows(tmp_path / "in" / "b.jsonl", texts(5000, 200))
    guess = estimate(options_of(tmp_path / "in", limit=60, estimate=1000))
    assert (guess.documents, guess.is_counted, guess.num_sampled) == (60, True, 60)
    monkeypatch.setattr(input_sample, "_MAX_ROWS", 100)
    guess = estimate(options_of(tmp_path / "in", limit=1000))
    assert (guess.documents, guess.is_counted) == (1000, False)
    assert estimate(options_of(tmp_path / "in", limit=10**6)).documents == 5050


def test_a_streamed_data_set_is_not_read_to_its_end(
    options_of: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(input_sample, "_MAX_ROWS", 120)
    folder = tmp_path / "unknown"
    for i in range(70):
        write_rows(folder / f"train-{i:03d}.jsonl", texts(30, 20, seed=i))
    with pytest.raises(UserError, match="more than 120 rows and does not say how many"):
        estimate(options_of(f"hf://{folder}"))
    assert estimate(options_of(f"hf://{folder}", limit=100)).documents == 100

    known = folder.rename(tmp_path / "known")
    split = "{name: train, num_examples: 2100, num_bytes: 1}"
    features = "[{name: text, dtype: string}]"
    header = f"---\ndataset_info:\n  features: {features}\n  splits: [{split}]\n---\n"
    (known / "README.md").write_text(header)
    guess = estimate(options_of(f"hf://{known}"))
    assert (guess.documents, guess.is_counted) == (2100, False)
    assert "the first 120 rows of 64 streamed shards" in guess.summary()


def test_costs_are_those_of_all_servers_and_a_short_run_is_called_one(
    options_of: Options, server: UnrulyServer, tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", texts(100, 20))
    with unruly_server() as other:
        options = options_of(tmp_path / "in.jsonl", endpoints=[server.url, other.url])
        few = estimate(options)
        many = estimate(dataclasses.replace(options, max_num_seqs=4))
    assert few.num_devices == 2 and "tokens/s on 2 servers" in few.summary()
    assert few.device_hours == pytest.approx(2 * few.generation_s / 3600)
    assert "more documents give a better estimate" in few.summary()
    assert many.max_in_flight == 8 and "better estimate" not in many.summary()


def test_servers_that_do_not_tell_lengths_have_a_cost(
    options_of: Options, server: UnrulyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "usage", False)
    write_rows(tmp_path / "in.jsonl", texts(10, 20))
    with pytest.warns(UserWarning, match="does not report"):
        guess = estimate(options_of(tmp_path / "in.jsonl"))
    assert guess.device_hours > 0 and "0 tokens/s" in guess.summary()
