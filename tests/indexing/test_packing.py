"""Packing: every example once, in one row, no row too long; and an index that is whole or not there."""

import gc
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from chat_templates import CHATML_WITH_SPANS, make_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from indexing_inputs import generated_text

from megatron_tpt.errors import StoppedEarly, UserError
from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import ConversationFormat, Example
from megatron_tpt.indexing.example_files import read_examples
from megatron_tpt.indexing.inspection import inspect_index
from megatron_tpt.indexing.inspection_options import InspectOptions
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing import pack
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer

from megatron.core.datasets.indexed_dataset import IndexedDataset

LENGTH = 200
KINDS = ("bin", "idx", "sft")


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """As the books have it, in quadratic time."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[item] <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_every_example_is_once_in_one_row_that_is_not_too_long(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    packing = pack(np.array(lengths, dtype=np.int64), capacity)
    rows = [packing.row(number).tolist() for number in range(packing.num_rows)]
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[item] for item in row) <= capacity for row in rows)
    assert rows == first_fit_decreasing(lengths, capacity)


def test_rows_of_realistic_lengths_are_nearly_full() -> None:
    lengths = np.random.RandomState(0).lognormal(np.log(4500), 0.8, 20_000).astype(np.int64)
    lengths = lengths[(lengths > 0) & (lengths <= 32769)]
    packing = pack(lengths, 32769)
    assert packing.num_rows <= 1.002 * lengths.sum() / 32769


@pytest.fixture(scope="module")
def tokenizer_path(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer", documents)


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    roles = ("user", "assistant")
    return [
        [
            {"role": roles[i % 2], "content": f"{number}: {generated_text(10 * number + i, rng.randint(1, 12))}"}
            for i in range(rng.choice([2, 2, 4, 5]))
        ]
        for number in range(300)
    ]


@pytest.fixture(scope="module")
def chats(conversations: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


@pytest.fixture
def options(chats: Path, tokenizer_path: Path, tmp_path: Path) -> dict:
    return {"input": [chats], "tokenizer": tokenizer_path, "output": tmp_path / "sft", "sequence_length": LENGTH}


def content(prefix: Path) -> dict[str, bytes]:
    return {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in KINDS}


def as_set(examples: list[Example]) -> list[tuple]:
    return sorted((tuple(example.tokens.tolist()), tuple(example.has_loss.tolist())) for example in examples)


def test_packed_index_holds_the_examples_and_megatron_reads_its_rows(options: dict, chats: Path) -> None:
    manifest = pack_sft(PackOptions(**options))
    index = PackedIndex(options["output"])
    tokenizer = Tokenizer(options["tokenizer"])
    format = ConversationFormat(tokenizer, ChatTemplate(tokenizer), "messages")
    expected = [example for _, example in read_examples(chats, format) if isinstance(example, Example)]
    expected = [example for example in expected if len(example.tokens) <= LENGTH + 1]
    rows = [index[row] for row in range(len(index))]
    assert as_set([example for row in rows for example in row]) == as_set(expected)

    dataset = IndexedDataset(str(options["output"]))
    assert len(dataset) == len(rows)
    for tokens, row in zip(dataset, rows, strict=True):
        assert tokens.tolist() == np.concatenate([example.tokens for example in row]).tolist()
        assert len(tokens) <= LENGTH + 1

    counts = manifest.counts
    assert counts.examples == len(expected) and counts.examples + counts.skipped["too long"] == 300
    assert counts.tokens == sum(len(example.tokens) for example in expected)
    assert counts.loss_tokens == sum(int(example.has_loss.sum()) for example in expected)
    assert counts.fewest_rows <= counts.rows == len(rows)
    assert manifest.efficiency == counts.tokens / (counts.rows * (LENGTH + 1)) > 0.9
    assert Path(f"{options['output']}.sft").stat().st_size < 40 * counts.examples + 8 * counts.rows


def test_every_kind_of_file_gives_the_same_bytes(options: dict, chats: Path, conversations: list) -> None:
    folder = options["output"].parent
    raw = chats.read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    # Two frames, as tools that append make them.
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    pyarrow.parquet.write_table(pyarrow.table({"messages": conversations}), folder / "a.parquet")
    pack_sft(PackOptions(**options))
    datasets.Dataset.from_dict({"id": range(300), "messages": conversations}).save_to_disk(folder / "saved")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"):
        output = folder / f"packed-{name.replace('.', '-')}"
        pack_sft(PackOptions(**options | {"input": [folder / name], "output": output}))
        assert content(output) == content(options["output"])


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_packed_file_that_was_cut_is_refused(suffix: str, options: dict, chats: Path, tmp_path: Path) -> None:
    compress = gzip.compress if suffix == "gz" else zstandard.compress
    path = tmp_path / f"cut.jsonl.{suffix}"
    path.write_bytes(compress(chats.read_bytes())[:-2000])
    with pytest.raises(UserError, match=rf"cut\.jsonl\.{suffix}: damaged or truncated"):
        pack_sft(PackOptions(**options | {"input": [path]}))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("sft", ".tmp"))]


def test_the_same_command_again_verifies_and_leaves_it_alone(options: dict, capsys: pytest.CaptureFixture) -> None:
    first = pack_sft(PackOptions(**options))
    before = content(options["output"])
    assert pack_sft(PackOptions(**options)) == first
    assert "already done and whole" in capsys.readouterr().out
    assert content(options["output"]) == before


def test_what_differs_from_the_packed_index_in_the_same_place_is_shown(options: dict, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path in paths:
        shutil.copy(options["input"][0], path)
    template = tmp_path / "template.jinja"
    template.write_text(CHATML_WITH_SPANS)
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d') }}" + CHATML_WITH_SPANS)
    options["input"] = paths[:2]
    pack_sft(PackOptions(**options))
    a, b, c = paths
    for change, words in [
        ({"sequence_length": 300}, r"\(--sequence-length: 200 -> 300\)"),
        ({"sequence_length": 300, "on_too_long": "truncate"}, "200 -> 300; --on-too-long: skip -> truncate"),
        ({"chat_template": template}, "checksum of the chat template: sha256:[0-9a-f]{12} -> sha256:[0-9a-f]{12}"),
        ({"messages_column": "chat"}, "columns: messages -> chat"),
        ({"chat_template": dated, "date": "2024-07-26"}, "sha256:[0-9a-f]{12}; --date: none -> 2024-07-26"),
        ({"input": paths}, rf"\(added to the input: {c}\)"),
        ({"input": [a]}, rf"\(removed from the input: {b}\)"),
        ({"input": [a, c]}, rf"\(added to the input: {c}; removed from the input: {b}\)"),
        ({"input": [b, a]}, "the input files are the same in another order"),
    ]:
        with pytest.raises(UserError, match=words):
            pack_sft(PackOptions(**options | change))
    b.write_text(b.read_text() + b.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=rf"\(changed in the input: {b}\)"):
        pack_sft(PackOptions(**options))
    edited = tmp_path / "edited"
    shutil.copytree(options["tokenizer"], edited)
    (edited / "tokenizer.json").write_text((edited / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match=rf"--tokenizer: .*/tokenizer -> {edited}; changed in the input: {b}\)"):
        pack_sft(PackOptions(**options | {"tokenizer": edited}))


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_and_missing_bytes_are_found(kind: str, options: dict) -> None:
    pack_sft(PackOptions(**options))
    path = Path(f"{options['output']}.{kind}")
    good = path.read_bytes()
    path.write_bytes(good[:-4])
    with pytest.raises(UserError, match=r"damaged"):
        PackedIndex(options["output"])
    flipped = bytearray(good)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged"):
        pack_sft(PackOptions(**options))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_without_the_column_or_damaged_is_named(kind: str, options: dict, conversations: list) -> None:
    path = options["output"].with_name(f"a.{kind}")
    table = pyarrow.table({"messages": conversations})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    options |= {"input": [path]}
    with pytest.raises(UserError, match=rf"a\.{kind}: no column 'chat'; its columns are messages"):
        pack_sft(PackOptions(**options, messages_column="chat"))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=rf"a\.{kind}: damaged or truncated"):
        pack_sft(PackOptions(**options))


def test_a_packed_index_is_shown_and_verified_as_one(options: dict, capsys: pytest.CaptureFixture) -> None:
    prefix = options["output"]
    counts = pack_sft(PackOptions(**options)).counts
    capsys.readouterr()
    assert inspect_index(InspectOptions(prefix, verify=True))
    shown = capsys.readouterr().out
    for expected in (
        f"{counts.examples:,} examples",
        f"{counts.loss_tokens:,} (mask",
        "too long",
        "bounds of examples",
        "checksums, tokenizer",
        "ends of turns  <|im_end|> (5)",
        "chat_template.jinja",
    ):
        assert expected in shown
    inspect_index(InspectOptions(prefix, json=True))
    assert json.loads(capsys.readouterr().out)["manifest"]["counts"]["examples"] == counts.examples
    for path in (*(Path(f"{prefix}.{kind}") for kind in KINDS), Path(f"{prefix}.tokenizer/tokenizer_config.json")):
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        with pytest.raises(UserError, match="damaged"):
            inspect_index(InspectOptions(prefix, verify=True))
        path.write_bytes(good)


def test_an_example_too_long_is_skipped_truncated_or_named(options: dict, tokenizer_path: Path) -> None:
    path = options["output"].with_name("long.jsonl")
    chat = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f " * 60}]
    late = [{"role": "user", "content": "a b c " * 60}, {"role": "assistant", "content": "d"}]
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in (chat[:1] + late[1:], chat, late))
    )
    options |= {"input": [path], "sequence_length": 64}
    with pytest.raises(UserError, match=r"long\.jsonl:2: \d+ tokens, a row holds 65: raise --sequence-length"):
        pack_sft(PackOptions(**options, on_too_long="stop"))
    assert pack_sft(PackOptions(**options)).counts.skipped == {"too long": 2}
    truncated = options["output"].with_name("truncated")
    counts = pack_sft(PackOptions(**options | {"output": truncated}, on_too_long="truncate")).counts
    # Of the third nothing would be left to learn.
    assert (counts.examples, counts.truncated, counts.skipped) == (2, 1, {"too long": 1})
    assert max(len(example.tokens) for row in PackedIndex(truncated) for example in row) == 65


def test_a_bad_example_is_named_or_counted(options: dict, chats: Path) -> None:
    path = options["output"].with_name("bad.jsonl")
    lines = chats.read_text().splitlines()[:3]
    lines[1:1] = ["", '{"messages": []}', "[1]", "{", '{"messages": [{"role": "user", "content": "a"}]}']
    path.write_text("\n".join(lines) + "\n")
    options |= {"input": [path], "sequence_length": 1000}
    with pytest.raises(UserError, match=r"bad\.jsonl:3: no messages .*--on-bad-record skip"):
        pack_sft(PackOptions(**options))
    counts = pack_sft(PackOptions(**options, on_bad_record="skip")).counts
    assert counts.examples == 3
    assert counts.skipped == {"no messages": 1, "not a JSON object": 1, "not JSON": 1, "nothing to learn": 1}
    assert counts.skipped_example["not a JSON object"] == f"{path}:4: but a list"
    assert PackManifest.read(options["output"]).counts == counts


PAIRS = {"prompt_column": "prompt", "response_column": "response"}


@pytest.mark.parametrize("columns", [PAIRS, pytest.param({}, marks=pytest.mark.slow)])
def test_workers_change_neither_the_bytes_nor_the_counts(
    columns: dict, options: dict, conversations: list, tmp_path: Path
) -> None:
    lines = [
        json.dumps({"messages": chat, "prompt": chat[0]["content"], "response": chat[1]["content"]}) + "\n"
        for chat in conversations
    ]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for path, part in zip(paths, (lines[:280], ["\n", *lines[280:], "{\n", "[]\n"], lines[:5]), strict=True):
        path.write_text("".join(part))
    options |= {"input": paths, "on_bad_record": "skip", **columns}
    alone = pack_sft(PackOptions(**options, num_workers=1))
    before = content(options["output"])
    together = pack_sft(PackOptions(**options | {"output": tmp_path / "two"}, num_workers=2))
    assert content(tmp_path / "two") == before
    assert (together.counts, together.sources) == (alone.counts, alone.sources)
    assert not list(tmp_path.glob(".tmp-*"))


def test_small_inputs_are_packed_by_one_process() -> None:
    options = {"input": ["a"], "tokenizer": Path("t"), "output": Path("o"), "sequence_length": 8}
    assert PackOptions(**options).worker_count(1000) == 1
    assert 1 <= PackOptions(**options).worker_count(1 << 40) == len(os.sched_getaffinity(0))
    assert PackOptions(**options, num_workers=7).worker_count(1000) == 7


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, StoppedEarly), (signal.SIGINT, KeyboardInterrupt)])
def test_an_interrupted_job_says_that_nothing_was_written(
    signum: int, error: type[BaseException], options: dict, chats: Path, capsys: pytest.CaptureFixture
) -> None:
    path = options["output"].with_name("many.jsonl")
    path.write_text(chats.read_text() * 60)  # the signal has to arrive before the end, on a busy machine too
    examples = options["output"].with_name(".tmp-sft") / "examples"

    def interrupt() -> None:
        while not examples.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    gc.collect()  # an interrupt in the finalizer of what an earlier test has left would be lost
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(error) as stopped:
        pack_sft(PackOptions(**options | {"input": [path]}))
    thread.join()
    said = str(stopped.value) if error is StoppedEarly else capsys.readouterr().err
    assert f"{options['output']} was not written; the same command packs it from the start" in said
    assert [path.name for path in options["output"].parent.iterdir()] == ["many.jsonl"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("\n", "its files are empty"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n' * 2,
            "2 skipped: nothing to learn .such as .*jsonl:1: ",
        ),
        ('{"text": "a"}\n{\n', "1 skipped: no messages .*; 1 skipped: not JSON"),
    ],
)
def test_an_input_of_which_nothing_can_be_learned_is_refused(lines: str, words: str, options: dict) -> None:
    path = options["output"].with_name("nothing.jsonl")
    path.write_text(lines)
    with pytest.raises(UserError, match=words):
        pack_sft(PackOptions(**options | {"input": [path]}, on_bad_record="skip"))
    assert [path.name for path in path.parent.iterdir()] == ["nothing.jsonl"]


def test_no_example_at_all_is_refused(options: dict) -> None:
    with pytest.raises(
        UserError, match=r"no example to pack: 300 skipped: too long \(such as .*chats\.jsonl:1: \d+ tokens, a row"
    ):
        pack_sft(PackOptions(**options | {"sequence_length": 3}))
    assert list(options["output"].parent.iterdir()) == []


def command(options: dict) -> list[str]:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "input"]
    return [sys.executable, "tools/pack_sft.py", "--input", str(options["input"][0]), *arguments]


def test_killed_at_any_moment_the_same_command_completes(options: dict, chats: Path) -> None:
    path = options["output"].with_name("many.jsonl")
    path.write_text(chats.read_text() * 5)
    options |= {"input": [path]}
    start = time.monotonic()
    subprocess.run(command(options | {"output": options["output"].with_name("unbroken")}), check=True)
    duration_s = time.monotonic() - start
    process = subprocess.Popen(command(options), start_new_session=True)
    time.sleep(duration_s * random.uniform(0.5, 0.95))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command(options), check=True)
    assert content(options["output"]) == content(options["output"].with_name("unbroken"))
    assert not list(options["output"].parent.glob(".tmp-*"))


def test_killed_between_renames_the_same_command_completes(options: dict) -> None:
    pack_sft(PackOptions(**options))
    before = content(options["output"])
    PackManifest.path(options["output"]).unlink()
    working = options["output"].with_name(".tmp-sft")
    working.mkdir()
    Path(f"{options['output']}.sft").rename(working / "sft")
    with pytest.raises(UserError, match=r"sft\.bin exists and was not made by this program"):
        pack_sft(PackOptions(**options))  # nothing says that it was moving files into place
    (working / "publishing").touch()
    (working / "tokenizer").mkdir()
    (working / "tokenizer" / "added_tokens.json").touch()
    assert "added_tokens.json" not in pack_sft(PackOptions(**options)).tokenizer_checksums
    assert content(options["output"]) == before
    PackedIndex(options["output"]).verify()


@pytest.mark.parametrize("kind", ["tokenizer", "bin", "sft"])
def test_what_another_hand_has_put_in_the_place_of_the_output_stays(kind: str, options: dict) -> None:
    path = Path(f"{options['output']}.{kind}")
    path.mkdir()
    with pytest.raises(UserError, match=rf"sft\.{kind} exists and was not made by this program"):
        pack_sft(PackOptions(**options))
    assert path.is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 0}, "--sequence-length 0"),
        ({"prompt_column": "prompt"}, "need each other"),
        ({"chat_template_kwargs": "{thinking: 1}"}, "is not JSON"),
        ({"chat_template_kwargs": "[1]"}, "not a JSON object"),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, "reads no variable 'enable_thinking'"),
        (
            {"prompt_column": "prompt", "response_column": "response", "messages_column": "messages"},
            "--messages-column: omit it with",
        ),
        ({"num_workers": 0}, "--num-workers 0"),
        ({"date": "today"}, "YYYY-MM-DD"),
        ({"messages_column": "chat"}, "chats.jsonl:1: no messages"),
    ],
)
def test_mistakes_are_named(change: dict, words: str, options: dict) -> None:
    with pytest.raises(UserError, match=words):
        pack_sft(PackOptions(**options | change))


def test_the_command_ends_with_code_2_and_one_line(options: dict) -> None:
    result = subprocess.run(command(options | {"input": ["nowhere.jsonl"]}), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: nowhere.jsonl: no such file or folder\n")
