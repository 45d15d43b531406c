"""Tokenizers of SentencePiece and tiktoken become Hugging Face folders that give the same tokens, or nothing."""

import base64
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from indexing_inputs import generated_text
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.convert_tokenizer import LLAMA3_PATTERN, convert_tokenizer
from megatron_tpt.indexing.encoders import NASTY_TEXTS
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import ConvertTokenizerOptions, IndexOptions
from megatron_tpt.indexing.originals import import_optional, tiktoken_encoder
from megatron_tpt.indexing.tokenizer import Tokenizer

TEXTS = [*(generated_text(i, 40) for i in range(200)), "a b  c\n\n d"]
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def train_sentencepiece(folder: Path, **settings: object) -> Path:
    (folder / "texts").write_text("\n".join(TEXTS))
    path = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(path),
        vocab_size=700,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return path.with_suffix(".model")


SYMBOLS = {"user_defined_symbols": ["koritheung", "ung", "[REF]"]}


@pytest.mark.parametrize(
    "settings",
    [{"add_dummy_prefix": True}, {"add_dummy_prefix": False, **SYMBOLS}, {"add_dummy_prefix": True, **SYMBOLS}],
)
def test_a_sentencepiece_model_gives_the_same_tokens(settings: dict, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **LLAMA, **settings)
    output = convert_tokenizer(ConvertTokenizerOptions(model, tmp_path / "out"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer(output)
    for text in [*TEXTS, "koritheung a koritheung", "[REF]", " [REF]ung [REF]a[REF]", "koritheun"]:
        tokens = tokenizer.encode(text)
        assert tokens == processor.encode(text)
        assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_id == processor.eos_id()
    assert (output / "tokenizer.model").read_bytes() == model.read_bytes()


MANY_SYMBOLS = [f"[{i}]" for i in range(100)]


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {**LLAMA, "user_defined_symbols": MANY_SYMBOLS}])
def test_a_model_that_hugging_face_tokenizers_cannot_follow_is_refused(settings: dict, tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **settings)
    with pytest.raises(UserError, match="cannot give its tokens: they differ on"):
        convert_tokenizer(ConvertTokenizerOptions(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def write_tiktoken(tokenizer_dir: Path, path: Path) -> None:
    """The bytes and merges of a byte-level tokenizer in tiktoken's format."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    encoder = {character: byte for byte, character in bytes_to_unicode().items()}
    merged = ["".join(merge) for merge in content["model"]["merges"]]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(encoder[character] for character in name) for name in dict.fromkeys(merged)]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def test_a_tiktoken_file_gives_the_same_tokens(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.tiktoken"
    write_tiktoken(tokenizer_dir, path)
    options = ConvertTokenizerOptions(path, tmp_path / "out", special_tokens=["<|start|>", "<|end|>"])
    with pytest.raises(UserError, match="names no end-of-sequence token: give --eos-token"):
        convert_tokenizer(options)
    tokenizer = Tokenizer(convert_tokenizer(replace(options, eos_token="<|end|>")))
    encode = tiktoken_encoder(path, LLAMA3_PATTERN)
    for text in [*TEXTS, *NASTY_TEXTS[:17]]:
        assert tokenizer.encode(text) == encode(text)
    assert tokenizer.eos_id == tokenizer.vocab_size - 1 == len(path.read_text().splitlines()) + 1


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_indexing_compares_the_input_with_the_original(kind: str, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "some.tiktoken"
    if kind == "tiktoken":
        write_tiktoken(tokenizer_dir, path)
    else:
        path = train_sentencepiece(tmp_path, **LLAMA)
    folder = convert_tokenizer(ConvertTokenizerOptions(path, tmp_path / "out", eos_token="</s>"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for backend in ("auto", "reference"):
        index(IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / backend, tokenizer_backend=backend))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:50]
    content["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    options = IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / "x", tokenizer_backend="reference")
    with pytest.raises(UserError, match=r"tokenizer\.json and tokenizer\.model disagree on"):
        index(options)
    (folder / "tokenizer.model").write_bytes(b"neither")
    index(options)
    assert "is not compared with it" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x needs the package no_such_package: pip install"):
        import_optional("no_such_package", "x")
    with pytest.raises(UserError, match=r"holds no tekken\.json, \*\.model"):
        convert_tokenizer(ConvertTokenizerOptions(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        convert_tokenizer(ConvertTokenizerOptions(tmp_path / "nowhere", tmp_path / "out"))


MISTRAL_TEXTS = [
    *TEXTS[:40],
    *NASTY_TEXTS[:17],
    "a [REFERENCE_DOC_1] b",
    "[REF]a[/REF]",
    "[REFERENCE_DOC_19]",
    " [REF] x",
]


def mistral_data() -> Path:
    """Tokenizers as Mistral publishes them, which its library has with it."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.skip("mistral_common is not installed")
    return Path(package.origin).parent / "data"


@pytest.mark.parametrize("version", ["240323.model.v3", "241114.model.v7"])
def test_mistrals_sentencepiece_models_give_the_tokens_of_its_library(version: str, tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    path = mistral_data() / f"mistral_instruct_tokenizer_{version}"
    reference = SentencePieceTokenizer(path)
    tokenizer = Tokenizer(convert_tokenizer(ConvertTokenizerOptions(path, tmp_path / "out")))
    for text in MISTRAL_TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == reference.encode(text, bos=False, eos=False)
        assert tokenizer.decode(tokens) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (reference.eos_id, reference.n_words)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in ("[INST]", "[/INST]", "[TOOL_CALLS]"):
        assert loaded.encode(name, add_special_tokens=False) == [reference.get_special_token(name)]


@pytest.fixture(scope="module")
def small_tekken(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As those of Mistral, of few tokens: with words of GPT-4, and special tokens in another order than by id."""
    folder = tmp_path_factory.mktemp("tekken")
    write_tiktoken(tokenizer_dir, folder / "ranks")
    lines = [line.split() for line in (folder / "ranks").read_text().splitlines()]
    vocabulary = [{"rank": int(rank), "token_bytes": token, "token_str": None} for token, rank in lines]
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 4: "[THINK]", 3: "[INST]"}
    content = {
        "config": {
            "pattern": LLAMA3_PATTERN,
            "default_vocab_size": len(vocabulary) - 20 + 8,
            "default_num_special_tokens": 8,
            "version": "v11",
        },
        "vocab": vocabulary,
        "special_tokens": [{"rank": id, "token_str": name, "is_control": id < 4} for id, name in names.items()],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder / "tekken.json"


def assert_as_mistrals_library(tokenizer: Tokenizer, path: Path) -> None:
    reference = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(path)
    for text in [*MISTRAL_TEXTS, "[THINK]a[INST]"]:
        tokens = tokenizer.encode(text)
        assert tokens == reference.encode(text, bos=False, eos=False)
        assert tokenizer.decode(tokens) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (reference.eos_id, reference.n_words)
    loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
    for name in ("[INST]", "<s>", "<SPECIAL_7>"):
        id = reference.get_special_token(name) if name != "<SPECIAL_7>" else 7
        assert len(loaded) < 5000 and loaded.encode(name, add_special_tokens=False) == [id]


def test_a_tekken_file_gives_the_tokens_of_mistrals_library(small_tekken: Path, tmp_path: Path) -> None:
    folder = convert_tokenizer(ConvertTokenizerOptions(small_tekken, tmp_path / "out"))
    assert_as_mistrals_library(Tokenizer(folder), small_tekken)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "the ung tion 42"}) + "\n")
    index(IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / "good", tokenizer_backend="reference"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"merges": content["model"]["merges"][:20], "ignore_merges": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json and tekken\.json disagree on"):
        index(IndexOptions([tmp_path / "d.jsonl"], folder, tmp_path / "x", tokenizer_backend="reference"))


@pytest.mark.slow
def test_a_published_tekken_file_gives_the_tokens_of_mistrals_library(tmp_path: Path) -> None:
    path = mistral_data() / "tekken_240911.json"
    reference = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(path)
    tokenizer = Tokenizer(convert_tokenizer(ConvertTokenizerOptions(path, tmp_path / "out")))
    assert [tokenizer.encode(text) for text in MISTRAL_TEXTS] == [
        reference.encode(text, bos=False, eos=False) for text in MISTRAL_TEXTS
    ]


def test_a_folder_with_several_originals_says_which_is_taken(
    small_tekken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json"):
        (hub / name).write_text(f"{{}} {name}")
    shutil.copy(small_tekken, hub / "tekken.json")
    convert_tokenizer(ConvertTokenizerOptions(hub, tmp_path / "out"))
    said = capsys.readouterr().err
    assert "converting tekken.json, not tokenizer.model.v3, tokenizer.model, tokenizer.json; name another" in said
    (hub / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json, but tekken\.json; convert it: .*--input .*/tekken\.json"):
        Tokenizer(hub)
    (hub / "tekken.json").unlink()
    with pytest.raises(UserError, match=r"but tokenizer\.model\.v3; convert it: .*--input .*/tokenizer\.model\.v3"):
        Tokenizer(hub)


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("tekken.json", "{", {}, "not readable as a tekken.json"),
        ("tekken.json", "[]", {}, "not readable as a tekken.json"),
        ("tekken.json", '{"config": {}, "vocab": []}', {}, "not readable as a tekken.json"),
        ("tekken_1.json", None, {"pattern": "a"}, "--pattern: for tiktoken files"),
        ("tekken_1.json", None, {"special_tokens": ["a"], "pattern": "a"}, "--pattern and --special-tokens: for"),
        ("tokenizer.json", "{}", {}, "a Hugging Face tokenizer already"),
        ("tokenizer.model.v7", "x", {}, "not readable as a SentencePiece model"),
    ],
)
def test_what_is_no_tokenizer_or_has_no_effect_is_refused(
    name: str, content: str | None, options: dict, words: str, small_tekken: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(small_tekken.read_bytes() if content is None else content.encode())
    with pytest.raises(UserError, match=words):
        convert_tokenizer(ConvertTokenizerOptions(path, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_tekken_file_with_a_hole_in_its_ranks_is_refused(small_tekken: Path, tmp_path: Path) -> None:
    content = json.loads(small_tekken.read_text())
    del content["vocab"][300]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="its ranks or names are not whole"):
        convert_tokenizer(ConvertTokenizerOptions(tmp_path, tmp_path / "out"))
