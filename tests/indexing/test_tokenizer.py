"""Raw text stays text; the end of a sequence and the think tags are found where tokenizers keep them."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexing_inputs import edit_tokenizer
from transformers import AutoTokenizer

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.tokenizer import Tokenizer, tokenizer_fingerprint
from megatron_tpt.indexing.train_tokenizer import train_tokenizer

TRICKY = ["<think>", "</think>", "<|endoftext|>", "a<think>b</think>c", "<<think>>", "<think", "<|pad|><|pad|>"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TRICKY)).map("".join))
def test_any_text_survives_and_makes_no_special_token(tokenizer_dir: Path, text: str) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.eos_id, *tokenizer.open_ids, *tokenizer.close_ids} & set(tokens)


@pytest.mark.parametrize("text", ["plain words", " 12 + 3 = 15\n\n", "naïve 日本 🙂"])
def test_ordinary_text_is_encoded_as_transformers_does(tokenizer_dir: Path, text: str) -> None:
    reference = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer = Tokenizer(tokenizer_dir)
    assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    tagged = f"<think>\n{text}\n</think>\n{text}"
    assert tokenizer.encode_tagged(tagged) == reference(tagged, add_special_tokens=False).input_ids


def test_post_processors_and_truncation_add_and_take_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|pad|> $A <|endoftext|>", special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    changed = edit_tokenizer(tokenizer_dir, tmp_path / "changed", **json.loads(backend.to_str()))
    text = "a sentence of more than four tokens"
    assert Tokenizer(changed).encode(text) == Tokenizer(tokenizer_dir).encode(text)


def test_tags_that_are_no_tokens_are_spelt(tokenizer_dir: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocabulary = {k: v for k, v in content["model"]["vocab"].items() if "think>" not in k}
    added = [token for token in content["added_tokens"] if "think>" not in token["content"]]
    folder = edit_tokenizer(
        tokenizer_dir, tmp_path / "no-tags", model=content["model"] | {"vocab": vocabulary}, added_tokens=added
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.open_ids == tokenizer.encode("<think>") and len(tokenizer.open_ids) > 1
    assert tokenizer.decode(tokenizer.close_ids) == "</think>"


def test_special_words_of_a_word_vocabulary_are_spelt_out(word_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(word_tokenizer_dir)
    assert (tokenizer.eos_id, tokenizer.open_ids, tokenizer.close_ids) == (0, [1], [2])
    assert tokenizer.vocab_size == 66_011
    assert tokenizer.encode("a <think> b <eos>") == tokenizer.encode("a < think> b < eos>")
    assert tokenizer.encode("w3 w4") == [14, 15]


EOS_SOURCES = [
    {"tokenizer_config.json": {"eos_token": "</think>"}},
    {"tokenizer_config.json": {"eos_token": {"content": "</think>"}}},
    {"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "</think>"}},
    {"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [3, 1]}},
    {"tokenizer_config.json": {}, "config.json": {"eos_token_id": 3}},
]


@pytest.mark.parametrize("files", EOS_SOURCES)
def test_the_end_of_sequence_is_found(tokenizer_dir: Path, tmp_path: Path, files: dict) -> None:
    folder = edit_tokenizer(tokenizer_dir, tmp_path / "edited")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert Tokenizer(folder).eos_id == 3


REFUSED = [
    ({"tokenizer_config.json": "{}"}, "names no end-of-sequence token"),
    ({"tokenizer_config.json": '{"eos_token": "<gone>"}'}, "not in the tokenizer's vocabulary"),
    ({"tokenizer_config.json": "{}", "config.json": '{"eos_token_id": 99999}'}, "not in the tokenizer's"),
    ({"tokenizer_config.json": "{"}, "not JSON"),
    ({"tokenizer.json": "{}"}, "not a readable tokenizer"),
    ({"tokenizer.json": None}, "no tokenizer.json"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
def test_unusable_tokenizers_are_refused_in_one_line(
    tokenizer_dir: Path, tmp_path: Path, files: dict, message: str
) -> None:
    folder = edit_tokenizer(tokenizer_dir, tmp_path / "edited")
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such tokenizer folder"):
        Tokenizer(tmp_path / "missing")


def test_training_is_deterministic_and_stores_the_template(
    documents: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "template").write_text("{{ messages[0]['content'] }}")
    options = TrainTokenizerOptions(
        input=[documents],
        output=tmp_path / "again",
        vocab_size=1000,
        special_tokens=["<|im_end|>"],
        chat_template=tmp_path / "template",
    )
    train_tokenizer(options)
    reference = AutoTokenizer.from_pretrained(options.output)
    assert reference.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert reference.convert_tokens_to_ids("<|im_end|>") == 4
    # The tags must stay visible in what a model writes, other special tokens not.
    assert reference.decode([2, 4, 3, 0], skip_special_tokens=True) == "<think></think>"
    same = TrainTokenizerOptions(input=[documents], output=tmp_path / "same", vocab_size=1000)
    assert tokenizer_fingerprint(train_tokenizer(same)) == tokenizer_fingerprint(tokenizer_dir)


def test_a_vocabulary_smaller_than_asked_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text('{"text": "to be or not to be, to be or not to be"}\n')
    for vocab_size, said in [(261, False), (600, True)]:
        train_tokenizer(TrainTokenizerOptions(input=[path], output=tmp_path / str(vocab_size), vocab_size=vocab_size))
        assert (f"fewer than --vocab-size {vocab_size}," in capsys.readouterr().err) is said


def test_tokenizer_training_refuses_what_it_cannot_do(documents: Path, tmp_path: Path) -> None:
    def options(**changes):
        return TrainTokenizerOptions(**({"input": [documents], "output": tmp_path / "tok"} | changes))

    (tmp_path / "empty.jsonl").write_text("\n")
    for wrong, message in [
        (options(output=tmp_path), "exists"),
        (options(vocab_size=259), "too small"),
        (options(text_column="body"), r"documents.jsonl:1: no text"),
        (options(input=[tmp_path / "empty.jsonl"]), "no document"),
        (options(chat_template=tmp_path / "none"), "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            train_tokenizer(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]
