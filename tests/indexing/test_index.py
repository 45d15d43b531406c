"""The index is Megatron's to the byte, distinguishes document from thinking, and is there whole or not at all."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexing_inputs import edit_tokenizer, generated_text

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.encoders import NASTY_TEXTS
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.join import Join
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.indexing.verification import verify
from megatron_tpt.indexing.writer import IndexWriter
from megatron_tpt.records import read_records

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

REPOSITORY = Path(__file__).parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "index.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def build_with_megatron(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for tokens in documents:
        builder.add_document(numpy.asarray(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    for kind in ("bin", "idx"):
        assert Path(f"{ours}.{kind}").read_bytes() == Path(f"{theirs}.{kind}").read_bytes()


def test_generated_documents_are_indexed_as_megatron_does(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = index(IndexOptions([documents], tokenizer_dir, tmp_path / "ours"))
    tokenizer = Tokenizer(tokenizer_dir)
    expected = []
    for record in read_records([documents]):
        thinking = []
        if record.thinking is not None:
            thinking = [2, *tokenizer.encode(f"\n{record.thinking.strip()}\n"), 3]
        expected.append([*tokenizer.encode(record.text), *thinking, 0])
    build_with_megatron(tmp_path / "theirs", expected, tokenizer.vocab_size)
    assert_same_bytes(tmp_path / "ours", tmp_path / "theirs")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [tokens.tolist() for tokens in dataset[:]] == expected
    assert (manifest.dtype, manifest.counts.documents, manifest.counts.skipped) == ("uint16", 2000, {})
    assert manifest.counts.tokens == sum(map(len, expected))
    assert manifest.counts.documents_with_thinking == 667
    assert verify(tmp_path / "ours") == manifest


@pytest.mark.skipif(not GSM8K.exists(), reason=f"the GSM8K documents are not at {GSM8K}")
def test_5000_real_documents_are_indexed_as_megatron_does(tmp_path: Path) -> None:
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:5000]
    with gzip.open(tmp_path / "gsm8k.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    source, columns = [tmp_path / "gsm8k.jsonl.gz"], "question,answer"
    tokenizer_dir = train_tokenizer(
        TrainTokenizerOptions(source, tmp_path / "tok", text_column=columns, vocab_size=4096)
    )
    index(IndexOptions(source, tokenizer_dir, tmp_path / "ours", text_column=columns))
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = [json.loads(line) for line in lines]
    ids = reference([f"{row['question']}\n{row['answer']}" for row in rows], add_special_tokens=False).input_ids
    build_with_megatron(tmp_path / "theirs", ([*tokens, 0] for tokens in ids), len(reference))
    assert_same_bytes(tmp_path / "ours", tmp_path / "theirs")
    verify(tmp_path / "ours")


ODD_TEXTS = st.lists(
    st.text()
    | st.sampled_from([*NASTY_TEXTS, "<think>", "</think>", "<|endoftext|>", "<|pad|>", "\u2028", "\x00"])
    | st.builds(lambda text, times: text * times, st.text(max_size=5), st.integers(1, 20_000)),
    max_size=4,
).map("".join)


def test_any_document_is_decoded_from_its_index_as_it_was(tokenizer_dir: Path) -> None:
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text()) | {"added_tokens": []}
    raw = tokenizers.Tokenizer.from_str(json.dumps(content))  # knows no tags and special tokens

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(ODD_TEXTS, st.none() | ODD_TEXTS), max_size=6),
        st.sampled_from(["lines", "escaped", "table"]),
    )
    def check(drawn: list[tuple[str, str | None]], kind: str) -> None:
        rows = [{"text": text, "thinking": thinking} for text, thinking in [("first", None), *drawn]]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("d.parquet" if kind == "table" else "d.jsonl")
            if kind == "table":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                path.write_text("".join(json.dumps(row, ensure_ascii=kind == "escaped") + "\n" for row in rows))
            prefix = Path(folder) / "x"
            manifest = index(IndexOptions([path], tokenizer_dir, prefix, on_bad_record="skip"))
            reader = IndexReader(prefix)
            found = [reader.document(number).tolist() for number in range(reader.num_documents)]
        expected, texts = [], []
        for row in (row for row in rows if row["text"].strip()):
            thinking = (row["thinking"] or "").strip()
            tokens = raw.encode(row["text"]).ids
            if thinking:
                tokens += [2, *raw.encode(f"\n{thinking}\n").ids, 3]
            expected.append([*tokens, 0])
            texts.append(row["text"] + (f"<think>\n{thinking}\n</think>" if thinking else "") + "<|endoftext|>")
        assert found == expected
        assert whole.decode_batch(found, skip_special_tokens=False) == texts
        assert manifest.counts.skipped == ({"empty text": num} if (num := len(rows) - len(texts)) else {})

    check()


def test_large_vocabularies_take_four_bytes(word_tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = [f"w{i * 13} w65999 a" for i in range(5000)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = index(IndexOptions([tmp_path / "d.jsonl"], word_tokenizer_dir, tmp_path / "ours"))
    documents = ([11 + i * 13, 66_010, 7, 0] for i in range(5000))
    build_with_megatron(tmp_path / "theirs", documents, manifest.tokenizer.vocab_size)
    assert manifest.dtype == "int32"
    assert_same_bytes(tmp_path / "ours", tmp_path / "theirs")


def test_an_idx_of_several_chunks_is_megatrons_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tpt.indexing.writer._ROWS_PER_CHUNK", 7)
    lengths = [1, 5, 0, 3, 2, 8, 1, 1, 4, 9, 2, 2, 6, 1, 3]
    documents = [[n] * n for n in lengths]
    with IndexWriter(tmp_path / "ours.bin", tmp_path / "ours.idx", 100) as writer:
        for tokens in documents:
            writer.add_document(numpy.asarray(tokens, dtype=numpy.int32))
    build_with_megatron(tmp_path / "theirs", documents, 100)
    assert_same_bytes(tmp_path / "ours", tmp_path / "theirs")


JOINED = {
    Join.document_thinking: "a b <think> c </think> <eos>",
    Join.thinking_document: "<think> c </think> a b <eos>",
    Join.thinking_only: "<think> c </think> <eos>",
    Join.document_only: "a b <eos>",
    Join.interleaved: "a b <think> c </think> <eos>",
}


@pytest.mark.parametrize("join", Join)
def test_document_and_thinking_are_joined(word_tokenizer_dir: Path, tmp_path: Path, join: Join) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a b", "thinking": "  c\\n"}\n{"text": "d"}\n')
    options = IndexOptions([tmp_path / "d.jsonl"], word_tokenizer_dir, tmp_path / "x", join=join, on_bad_record="skip")
    counts = index(options).counts
    words = ["<eos>", "<think>", "</think>", "<", "think>", "/think>", "eos>", "a", "b", "c", "d"]
    dataset = IndexedDataset(str(tmp_path / "x"))  # its arrays do not outlive it
    found = [" ".join(words[id] for id in tokens) for tokens in dataset[:]]
    with_plain = join is not Join.thinking_only
    assert found == [JOINED[join]] + ["d <eos>"] * with_plain
    assert counts.thinking_tokens == (0 if join is Join.document_only else 3)
    assert counts.tokens == counts.document_tokens + counts.thinking_tokens == len(" ".join(found).split())
    assert counts.skipped == ({} if with_plain else {"no thinking": 1})
    if not with_plain:
        with pytest.raises(UserError, match="no thinking"):
            index(replace(options, output=tmp_path / "y", on_bad_record="stop"))


def test_tags_in_raw_text_are_no_tags(tokenizer_dir: Path, tmp_path: Path) -> None:
    record = {"text": "a <think> b", "thinking": "so </think> no <|endoftext|>"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    index(IndexOptions([tmp_path / "d.jsonl"], tokenizer_dir, tmp_path / "x"))
    tokens = IndexReader(tmp_path / "x").document(0).tolist()
    assert [tokens.count(id) for id in (2, 3, 0)] == [1, 1, 1]
    decoded = Tokenizer(tokenizer_dir).decode(tokens)
    assert decoded == "a <think> b<think>\nso </think> no <|endoftext|>\n</think><|endoftext|>"


def test_the_same_command_again_is_already_done_and_others_are_refused(
    documents: Path, tokenizer_dir: Path, word_tokenizer_dir: Path, tmp_path: Path, capsys
) -> None:
    options = IndexOptions([documents], tokenizer_dir, tmp_path / "x")
    first = index(options)
    before = (tmp_path / "x.json").stat().st_mtime_ns
    assert index(options) == first
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "x.json").stat().st_mtime_ns == before
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(documents.read_bytes())
    for changed, difference in [
        (replace(options, join=Join.document_only), "join"),
        (replace(options, tokenizer=word_tokenizer_dir), "tokenizer"),
        (replace(options, input=[copy]), r"input: 1 added \(.*copy\.jsonl\), 1 removed \(.*\)"),
        (replace(options, text_column="text,thinking"), "text column"),
    ]:
        with pytest.raises(
            UserError, match=f"other settings or input .*{difference}.*choose another --output"
        ) as error:
            index(changed)
        assert str(error.value).endswith(f"or remove {tmp_path}/x.{{bin,idx,json}}")  # not x*: that is x2, too
    os.truncate(tmp_path / "x.bin", 100)
    with pytest.raises(UserError, match=r"x\.bin has 100 bytes"):
        index(options)
    (tmp_path / "x.json").unlink()
    with pytest.raises(UserError, match="was not made by this program"):
        index(options)


def test_an_input_written_again_is_the_same_input_only_with_the_same_content(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text('{"text": "one"}\n')
    options = IndexOptions([source], tokenizer_dir, tmp_path / "x")
    manifest = index(options)
    os.utime(source, (1, 1))
    assert index(options) == manifest
    source.write_text('{"text": "two"}\n')
    with pytest.raises(UserError, match=r"input: 1 changed \(.*/d\.jsonl\)"):
        index(options)


BAD_INPUTS = [
    ('{"text": "good"}\n{"text":', "d.jsonl:2: not JSON"),
    ('{"text": "good"}\n{"body": "x"}', "d.jsonl:2: no text"),
    ('{"text": "good"}\n{"text": ""}', "d.jsonl:2: empty text"),
    ("", "has no bytes"),
    (None, "no such file"),
]


@pytest.mark.parametrize(("content", "message"), BAD_INPUTS)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    tokenizer_dir: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content)
    result = run_tool("--input", tmp_path / "d.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"] * (content is not None)


def test_bad_records_are_skipped_and_counted_when_asked(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\nbad\n{"text": ""}\n{"text": "too"}\n[]\nbad')
    arguments = ["--input", tmp_path / "d.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out"]
    result = run_tool(*arguments, "--on-bad-record", "skip")
    assert result.returncode == 0, result.stderr
    assert "2 documents" in result.stdout and "4 bad records skipped" in result.stdout
    counts = Manifest.read(tmp_path / "out").counts
    assert counts.skipped == {"not JSON": 2, "empty text": 1, "not a JSON object": 1}


def test_a_tokenizer_without_end_of_sequence_is_exit_2(tokenizer_dir: Path, documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    result = run_tool("--input", documents, "--tokenizer", folder, "--output", tmp_path / "out")
    assert result.returncode == 2 and "names no end-of-sequence token" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tok"]


def test_a_text_without_tokens_is_a_bad_record(word_tokenizer_dir: Path, tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 1, "<eos>": 0, "<": 2, "/": 3}, "merges": []}
    folder = edit_tokenizer(word_tokenizer_dir, tmp_path / "few", model=model)
    (tmp_path / "d.jsonl").write_text('{"id": "first", "text": "b"}\n{"text": "a"}')
    options = IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / "x")
    with pytest.raises(UserError, match=r"d.jsonl:1: no tokens"):
        index(options)
    assert index(replace(options, on_bad_record="skip")).counts.skipped == {"no tokens": 1}


def test_a_text_the_tokenizer_fails_on_is_one_line(word_tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "unheard-of"}')
    with pytest.raises(UserError, match="cannot encode"):
        index(IndexOptions([tmp_path / "d.jsonl"], word_tokenizer_dir, tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_an_output_that_is_a_folder_or_in_use_is_refused(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, Path(), Path(".."), Path("/")):
        with pytest.raises(UserError, match="takes a prefix"):
            index(IndexOptions([documents], tokenizer_dir, folder))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        index(IndexOptions([documents], tokenizer_dir, tmp_path / "file" / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_killed_runs_leave_no_index_and_the_next_run_is_right(tokenizer_dir: Path, tmp_path: Path) -> None:
    source, prefix = tmp_path / "d.jsonl", tmp_path / "out" / "train"
    with source.open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"text": generated_text(i % 20, 400) + str(i)}) + "\n")
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--output", prefix]
    process = subprocess.Popen([sys.executable, REPOSITORY / "tools" / "index.py", *map(str, arguments)])
    data = prefix.parent / ".tmp-train" / "00000.bin"
    while not (data.exists() and data.stat().st_size):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # else it might be done before the second one begins
    # A second run meanwhile is refused and does the first no harm.
    with pytest.raises(UserError, match="being written by another process"):
        index(IndexOptions([source], tokenizer_dir, prefix))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name for path in prefix.parent.iterdir()}
    assert ".tmp-train" in left
    assert left <= {
        ".tmp-train",
        "train.bin",
        "train.idx",
    }  # it may have been moving its files into place: the manifest comes last
    with pytest.raises(UserError, match="no such index"):
        Manifest.read(prefix)
    manifest = index(IndexOptions([source], tokenizer_dir, prefix))
    assert manifest.counts.documents == 2000
    assert verify(prefix) == manifest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["train.bin", "train.idx", "train.json"]
    unbroken = index(IndexOptions([source], tokenizer_dir, tmp_path / "unbroken"))
    assert unbroken.checksums == manifest.checksums


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("num_moves", range(4))
def test_a_run_killed_while_publishing_is_made_good(
    documents: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_moves: int
) -> None:
    options = IndexOptions([documents], tokenizer_dir, tmp_path / "x")
    move, moves = os.replace, []

    def move_or_die(source: Path, target: str) -> None:
        if Path(source).parent.name == ".tmp-x" and not Path(source).name.startswith("."):
            if len(moves) == num_moves:
                raise Killed
            moves.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move_or_die)
        patch.setattr("megatron_tpt.indexing.output.shutil.rmtree", lambda _: die())
        with pytest.raises(Killed):
            index(options)
    assert (tmp_path / "x.json").exists() == (num_moves == 3)
    manifest = index(options)
    assert verify(options.output) == manifest
    assert manifest.counts.documents == 2000
    assert not (tmp_path / ".tmp-x").exists()


def die() -> None:
    raise Killed


def test_damage_is_found_and_named(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    index(IndexOptions([documents], tokenizer_dir, prefix))
    good = {kind: Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx", "json")}

    def damaged(kind: str, data: bytes, message: str) -> None:
        Path(f"{prefix}.{kind}").write_bytes(data)
        with pytest.raises(UserError, match=message):
            verify(prefix)
        Path(f"{prefix}.{kind}").write_bytes(good[kind])

    def flipped(data: bytes, at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    damaged("bin", good["bin"][:-2], r"x\.bin has \d+ bytes")
    damaged("bin", flipped(good["bin"], 100), r"x\.bin: damaged: some of its bytes changed")
    damaged("idx", good["idx"][:-8], r"x\.idx has \d+ bytes")
    damaged("idx", flipped(good["idx"], 0), "does not begin like an index")
    damaged("idx", flipped(good["idx"], 18), "does not fit its counts")
    damaged("idx", flipped(good["idx"], 40), "does not fit x.idx")
    damaged("idx", flipped(good["idx"], 34 + 4 * 2000 + 80), r"damaged at byte 8114: the offset of sequence 10")
    damaged("idx", flipped(good["idx"], len(good["idx"]) - 80), r"damaged at byte \d+: (the last )?document|checksum")
    damaged("json", b"{}", "not an index manifest")
    for field, other in (
        (b'"bin": "sha', b'"bim": "sha'),
        (b'"idx": "sha', b'"": "sha'),
        (b'"checksums": {', b'"checksums": 7, "command": {'),
    ):
        assert field in good["json"]
        damaged("json", good["json"].replace(field, other), "not an index manifest")
    damaged("json", b"{", "not readable")
    damaged("json", good["json"].replace(b'"format_version": 1', b'"format_version": 2'), "version 2")
    verify(prefix)


def test_a_manifest_refuses_another_tokenizer(documents: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    manifest = index(IndexOptions([documents], tokenizer_dir, tmp_path / "x"))
    manifest.require_tokenizer(tmp_path / "x", Tokenizer(tokenizer_dir).fingerprint)
    with pytest.raises(UserError, match="another tokenizer"):
        manifest.require_tokenizer(tmp_path / "x", "sha256:0")


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys, runpy; sys.argv = ['index.py', '--help']\n"
        "try: runpy.run_path('tools/index.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pyarrow', 'megatron', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
