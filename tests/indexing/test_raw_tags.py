"""Marks computed from token ids are the truth, whatever tags and parts of tags the raw text holds."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tokenizers
from chat_templates import CHATML
from indexing_inputs import edit_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import ConversationFormat, Example, PairFormat
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.join import Join, pieces
from megatron_tpt.indexing.marks import find, mark_thinking
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Record, write_records
from megatron_tpt.records.record import BadRecord

PARTS = ["<think>", "</think>", "<think>\n", "<th", "ink>", "</", "<", "think", ">", " ", "\n", "ban", "日", "."]
SAMPLE = ["I think that thinking </b> of </i> things >> helps the <th> and <i> and > or ink. " * 3]


@pytest.fixture(scope="session")
def no_tags_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without think tokens, with merges that parts of the tags use."""
    folder = tmp_path_factory.mktemp("no-tags")
    write_records(folder / "sample.jsonl", (Record(str(i), text, None) for i, text in enumerate(SAMPLE * 20)))
    options = TrainTokenizerOptions(input=[folder / "sample.jsonl"], output=folder / "with", vocab_size=330)
    return without_tags(train_tokenizer(options), folder / "without")


def without_tags(source: Path, target: Path) -> Path:
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = {name: id for name, id in content["model"]["vocab"].items() if "think>" not in name}
    added = [token for token in content["added_tokens"] if "think>" not in token["content"]]
    return edit_tokenizer(source, target, model=content["model"] | {"vocab": vocabulary}, added_tokens=added)


@pytest.fixture(scope="session")
def metaspace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in the manner of SentencePiece: words begin with a mark, and a text with one too."""
    folder = tmp_path_factory.mktemp("metaspace")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        ["日 ban . \n x y", *SAMPLE] * 20,
        trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"]),
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def made_records(seed: int) -> list[Record]:
    rng = random.Random(seed)

    def text() -> str:
        return "x" + "".join(rng.choices(PARTS, k=rng.randint(0, 8))) + "y"

    records = []
    for i in range(150):
        record = Record(str(i), text(), text() if i % 3 else None)
        if i % 2:
            text_ends = sorted(rng.randint(0, len(record.text)) for _ in range(3))
            thinking_ends = [*sorted(rng.randint(0, len(record.thinking or "")) for _ in range(2))]
            thinking_ends.append(len(record.thinking or ""))
            chunks = [{"text_end": a, "thinking_end": b} for a, b in zip(text_ends, thinking_ends, strict=True)]
            record = replace(record, meta={"chunks": chunks})
        records.append(record)
    return records


@pytest.mark.parametrize("join", list(Join))
@pytest.mark.parametrize("folder", ["tokenizer_dir", "no_tags_dir", "metaspace_dir"])
def test_marks_are_what_the_join_says(folder: str, join: Join, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(folder))
    records = made_records(len(join))
    write_records(tmp_path / "d.jsonl", records)
    options = IndexOptions([tmp_path / "d.jsonl"], tokenizer.folder, tmp_path / "x", join=join, on_bad_record="skip")
    counts = index(options).counts
    reader, number, thinking_tokens = IndexReader(tmp_path / "x"), 0, 0

    def plain(text: str) -> str:
        return text.replace(" ", "") if folder == "metaspace_dir" else text  # which knows no space at a text's begin

    for record in records:
        try:
            sample = list(pieces(record, join))
        except BadRecord:
            continue
        tokens = numpy.asarray(reader.document(number), dtype=numpy.int64)
        number += 1
        if join is Join.document_only:
            assert tokens[:-1].tolist() == tokenizer.encode(record.text)
            continue
        marks = mark_thinking(tokens, tokenizer.open_ids, tokenizer.close_ids, tokenizer.eos_id)
        thinking = "".join(f"<think>{piece.text}</think>" for piece in sample if piece.is_thinking)
        document = "".join(piece.text for piece in sample if not piece.is_thinking)
        assert plain(tokenizer.decode(tokens[marks])) == plain(thinking)
        assert plain(tokenizer.decode(tokens[~marks][:-1])) == plain(document)
        thinking_tokens += int(marks.sum())
    assert (number, thinking_tokens) == (counts.documents, counts.thinking_tokens)


def test_the_records_of_these_tests_do_make_the_tokens_of_tags(no_tags_dir: Path, metaspace_dir: Path) -> None:
    for folder in (no_tags_dir, metaspace_dir):
        tokenizer = Tokenizer(folder)
        texts = tokenizer.encode_batch([record.text for record in made_records(1)])
        assert len(tokenizer.open_ids) > 1 and all(spelling.parts for spelling in tokenizer.tag_spellings())
        for ids in (tokenizer.open_ids, tokenizer.close_ids):
            assert any(len(find(tokens, ids)) for tokens in texts)


def test_blocks_and_backends_change_nothing(no_tags_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "d.jsonl", made_records(3))
    options = IndexOptions([tmp_path / "d.jsonl"], no_tags_dir, tmp_path / "x", tokenizer_backend="gigatoken")
    expected = index(options).checksums
    monkeypatch.setattr("megatron_tpt.indexing.index._MAX_BLOCK_BYTES", 1000)
    monkeypatch.setattr("megatron_tpt.indexing.index._MIN_BLOCK_BYTES", 1000)
    for backend in ("gigatoken", "reference"):
        assert index(replace(options, output=tmp_path / backend, tokenizer_backend=backend)).checksums == expected


def test_the_end_of_one_document_and_the_begin_of_the_next_are_no_tag(no_tags_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(no_tags_dir)
    texts = ["ban<", "think>ban"]
    halves = numpy.concatenate(tokenizer.encode_batch(texts))
    assert len(find(halves, tokenizer.open_ids))
    write_records(tmp_path / "d.jsonl", (Record(text, text, None) for text in texts))
    index(IndexOptions([tmp_path / "d.jsonl"], no_tags_dir, tmp_path / "x", append_eos=False))
    assert IndexReader(tmp_path / "x").tokens.tolist() == halves.tolist()


def test_a_tag_that_has_one_spelling_makes_a_bad_record(tmp_path: Path) -> None:
    """A tokenizer of single bytes."""
    lines = [{"text": "a < think>"}, {"text": "b <think>", "thinking": "c"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bytes_dir = without_tags(
        train_tokenizer(TrainTokenizerOptions([tmp_path / "d.jsonl"], tmp_path / "with", vocab_size=260)),
        tmp_path / "bytes",
    )
    options = IndexOptions([tmp_path / "d.jsonl"], bytes_dir, tmp_path / "x")
    with pytest.raises(UserError, match=r"d\.jsonl:2: a think tag in raw text.*--join document_only"):
        index(options)
    counts = index(replace(options, output=tmp_path / "y", on_bad_record="skip")).counts
    assert (counts.documents, counts.skipped) == (1, {"a think tag in raw text": 1})
    assert index(replace(options, output=tmp_path / "z", join=Join.document_only)).counts.documents == 2


def test_a_tag_in_a_prompt_does_not_begin_thinking(no_tags_dir: Path) -> None:
    tokenizer = Tokenizer(no_tags_dir)
    prompt = "ban<think>ban?"
    assert len(find(numpy.array(tokenizer.encode(prompt)), tokenizer.open_ids))
    ((example,),) = PairFormat(tokenizer, "p", "r").encode_batch([{"p": prompt, "r": "<think>a</think>A tag."}])
    assert isinstance(example, Example)
    marks = mark_thinking(example.tokens, tokenizer.open_ids, tokenizer.close_ids, tokenizer.eos_id)
    assert tokenizer.decode(example.tokens[marks]) == "<think>a</think>"


def test_a_tag_in_a_users_message_does_not_begin_thinking(no_tags_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(no_tags_dir)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    format = ConversationFormat(tokenizer, ChatTemplate(tokenizer, tmp_path / "chatml.jinja"), "messages")
    messages = [{"role": "user", "content": "ban<think>ban"}, {"role": "assistant", "content": "<think>a</think>b"}]
    ((example,),) = format.encode_batch([{"messages": messages}])
    assert isinstance(example, Example)
    marks = mark_thinking(example.tokens, tokenizer.open_ids, tokenizer.close_ids, tokenizer.eos_id)
    assert tokenizer.decode(example.tokens[marks]) == "<think>a</think>"
