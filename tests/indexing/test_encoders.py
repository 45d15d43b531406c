"""gigatoken gives the tokens of Hugging Face tokenizers, or is not used."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.indexing import encoders
from megatron_tpt.indexing.encoders import (
    Encoded,
    Encoder,
    GigatokenEncoder,
    ReferenceEncoder,
    SpotCheck,
    choose_encoder,
)
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.sample import sample_texts
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.records import Columns, expand_sources, read_records

SPECIAL = ["<think>", "</think>", "<|endoftext|>", "<|pad|>", "<", "|>", "think"]
TEXTS = st.lists(
    st.lists(st.text() | st.sampled_from([*SPECIAL, *encoders.NASTY_TEXTS]), max_size=4).map("".join), max_size=6
)


@pytest.fixture(scope="module")
def gpt2_words_dir(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that does not split digits."""
    target = tmp_path_factory.mktemp("gpt2") / "tokenizer"
    return train_tokenizer(TrainTokenizerOptions([documents], target, vocab_size=1000, split_digits=False))


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    tokens, lengths = encoder.encode(pyarrow.array(texts, pyarrow.large_string()))
    return [part.tolist() for part in numpy.split(tokens, numpy.cumsum(lengths)[:-1])] if texts else []


@pytest.mark.parametrize("parse_special_tokens", [False, True])
@pytest.mark.parametrize("folder", ["tokenizer_dir", "gpt2_words_dir"])
def test_gigatoken_encodes_any_text_as_the_reference_does(
    folder: str, parse_special_tokens: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(folder), parse_special_tokens=parse_special_tokens)
    fast, reference = GigatokenEncoder(tokenizer), ReferenceEncoder(tokenizer)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        tokens = encode(fast, texts)
        assert tokens == encode(reference, texts)
        assert [tokenizer.decode(part) for part in tokens] == texts

    check()


def test_huge_texts_are_encoded_as_the_reference_does(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    texts = ["ab " * 300_000, "x" * 20_000, "日本" * 50_000, "7" * 100_000, " " * 50_000, ""]
    assert encode(GigatokenEncoder(tokenizer), texts) == encode(ReferenceEncoder(tokenizer), texts)


def test_special_tokens_that_ordinary_merges_make_are_spelt_out(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    (the,) = tokenizer.encode("the")
    tokenizer.is_special[the] = True
    tokenizer._special_range = (0, the)
    tokenizer.special_tokens.append("the")
    texts = ["plain", "kothe", "the", "riba the the", "", "the"]
    tokens = encode(GigatokenEncoder(tokenizer), texts)
    assert tokens == encode(ReferenceEncoder(tokenizer), texts)
    assert the not in {id for part in tokens for id in part}
    assert [tokenizer.decode(part) for part in tokens] == texts


def test_unsupported_tokenizers_fall_back_loudly_or_stop(word_tokenizer_dir: Path, capsys) -> None:
    tokenizer = Tokenizer(word_tokenizer_dir)
    assert isinstance(choose_encoder(tokenizer, "auto", ["a b"]), ReferenceEncoder)
    message = capsys.readouterr().err
    assert "does not support this tokenizer" in message and "WordLevel" in message and message.count("\n") == 1
    with pytest.raises(UserError, match="--tokenizer-backend reference"):
        choose_encoder(tokenizer, "gigatoken", ["a b"])


def test_a_tokenizer_on_which_the_two_disagree_is_found(
    tokenizer_dir: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    assert isinstance(choose_encoder(tokenizer, "gigatoken", ["a b"]), GigatokenEncoder)
    description = encoders._description

    def with_few_merges(tokenizer: Tokenizer) -> dict:
        content = description(tokenizer)
        content["model"]["merges"] = content["model"]["merges"][:20]
        return content

    monkeypatch.setattr(encoders, "_description", with_few_merges)
    sample = [record.text for record in read_records([documents], limit=100)]
    assert isinstance(choose_encoder(tokenizer, "auto", sample), ReferenceEncoder)
    assert "disagree on" in capsys.readouterr().err
    options = IndexOptions([documents], tokenizer_dir, tmp_path / "x", tokenizer_backend="gigatoken")
    with pytest.raises(UserError, match="disagree on"):
        index(options)
    # What the sample does not show, the comparison on the way finds.
    monkeypatch.setattr(encoders, "_disagreement", lambda *_: None)
    with pytest.raises(UserError, match="disagree on"):
        index(options)


def test_the_spot_check_takes_every_text_in_its_turn(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    texts = pyarrow.array([f"text {i}" for i in range(10)], pyarrow.large_string())
    encoded = GigatokenEncoder(tokenizer).encode(texts)
    check = SpotCheck(tokenizer, GigatokenEncoder(tokenizer))
    for _ in range(10):
        check.check(texts, encoded)
    encoded.tokens[-1] += 1
    with pytest.raises(UserError, match="'text 9'"):
        for _ in range(10):
            check.check(texts, encoded)


def test_the_sample_has_beginnings_middles_and_ends_of_long_texts(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"b{'x' * 19_999}m{'x' * 19_999}e"}) + "\n"] * 4
    (tmp_path / "d.jsonl").write_text("".join(lines))
    texts = sample_texts(expand_sources([tmp_path / "d.jsonl"]), Columns())
    assert {len(text) for text in texts} == {10_000}
    assert {"".join(text.split("x")) for text in texts} == {"b", "m", "e"}


class WrongOnSnowmen(GigatokenEncoder):
    """Goes wrong on a rare text."""

    def encode(self, texts: pyarrow.LargeStringArray) -> Encoded:
        encoded = super().encode(texts)
        for i, end in enumerate(numpy.cumsum(encoded.lengths)):
            if "\u2603" in texts[i].as_py():
                encoded.tokens[end - 1] ^= 1
        return encoded


def test_the_spot_check_takes_long_texts_whole_and_of_the_longest_a_stretch(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    encoder = WrongOnSnowmen(tokenizer)

    def is_found(text: str) -> bool:
        texts = pyarrow.array([text], pyarrow.large_string())
        encoded, check = encoder.encode(texts), SpotCheck(tokenizer, encoder)
        try:
            for _ in range(10):
                check.check(texts, encoded)
        except UserError:
            return True
        return False

    assert is_found("\u2603" + "plain text " * 20_000)
    assert not is_found("\u2603" + "plain text " * 30_000)
    assert is_found("plain \u2603 text " * 30_000)


def test_the_spot_check_costs_little(tokenizer_dir: Path) -> None:
    class CountingTokenizer(Tokenizer):
        num_characters = 0

        def encode_batch(self, texts: Sequence[str]) -> list[numpy.ndarray]:
            self.num_characters += sum(map(len, texts))
            return super().encode_batch(texts)

    tokenizer = CountingTokenizer(tokenizer_dir)
    encoder = GigatokenEncoder(tokenizer)
    for text in ("plain text " * 5_000, "plain text " * 30_000):
        texts = pyarrow.array([text], pyarrow.large_string())
        encoded, check = encoder.encode(texts), SpotCheck(tokenizer, encoder)
        tokenizer.num_characters, num_bytes = 0, 0
        while num_bytes < 5e8:
            check.check(texts, encoded)
            num_bytes += len(text)
        assert 0.9 * num_bytes / 1000 < tokenizer.num_characters < num_bytes / 1000 + 300_000


def test_nothing_is_kept_of_what_gigatoken_encoded_once_it_is_found_wrong(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The first file holds a wrong text that is not compared, the last one that is. Between them stands one that is not
    small, and so makes the first be noted before the last is looked at."""
    lines = [json.dumps({"text": text}) for text in ("\u2603", *map(str, range(49)))]
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    (tmp_path / "1.jsonl").write_text(json.dumps({"text": "large " * 50_000}))
    (tmp_path / "2.jsonl").write_text(lines[0])
    inputs: list[Path | str] = [tmp_path / f"{number}.jsonl" for number in range(3)]
    options = IndexOptions(inputs, tokenizer_dir, tmp_path / "x", tokenizer_backend="reference")
    expected = index(replace(options, output=tmp_path / "expected")).checksums
    monkeypatch.setattr(encoders, "GigatokenEncoder", WrongOnSnowmen)
    monkeypatch.setattr(encoders, "_disagreement", lambda *_: None)
    with monkeypatch.context() as patch:  # killed before it could clear away
        patch.setattr("megatron_tpt.indexing.output.Output.discard", lambda _: None)
        with pytest.raises(UserError, match="--tokenizer-backend reference"):
            index(replace(options, tokenizer_backend="auto"))
    assert (tmp_path / ".tmp-x" / "journal").exists()
    with pytest.raises(UserError, match="--tokenizer-backend was gigatoken, now reference"):
        index(options)
    with pytest.raises(UserError, match="nothing is kept of what gigatoken encoded"):
        index(replace(options, tokenizer_backend="auto"))
    assert not (tmp_path / ".tmp-x").exists()
    assert index(options).checksums == expected
    assert "resuming after" in capsys.readouterr().err  # the second run, not the last


@pytest.mark.parametrize("backend", ["gigatoken", "reference"])
def test_special_tokens_in_raw_text_are_parsed_only_when_asked(
    tokenizer_dir: Path, tmp_path: Path, backend: str
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a <think> b</think><|pad|>"}))
    counts = []
    for parse in (False, True):
        output = tmp_path / f"{backend}-{parse}"
        index(
            IndexOptions(
                [tmp_path / "d.jsonl"],
                tokenizer_dir,
                output,
                parse_special_tokens=parse,
                tokenizer_backend=backend,
            )
        )
        tokens = IndexReader(output).document(0).tolist()
        counts.append([tokens.count(id) for id in (2, 3, 1)])
    assert counts == [[0, 0, 0], [1, 1, 1]]


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"no tokenizer.json, but tokenizer.model; convert it: tools/"):
        Tokenizer(tmp_path)
