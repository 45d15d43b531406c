"""A packed index carries what fine-tuning and inference need: the tokenizer, the chat template, the ends of turns."""

import json
from pathlib import Path

import pytest
from chat_templates import CHATML, CHATML_WITH_SPANS, LLAMA, SPECIAL_TOKENS, make_chat_tokenizer
from indexing_inputs import edit_tokenizer
from transformers import AutoTokenizer

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer, read_tokenizer_files, tokenizer_fingerprint

CHAT = [
    {"role": "system", "content": "count"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def chat_tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer", documents)


@pytest.fixture(scope="module")
def bare_tokenizer(chat_tokenizer: Path) -> Path:
    """The same without a template."""
    return edit_config(chat_tokenizer, chat_tokenizer.with_name("bare"), chat_template=None)


@pytest.fixture
def options(tmp_path: Path) -> dict:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "prompt": "one", "response": "two"}) + "\n")
    return {"input": [path], "output": tmp_path / "sft", "sequence_length": 200}


def edit_config(source: Path, target: Path, **changes: object) -> Path:
    edit_tokenizer(source, target)
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def packed_text(prefix: Path) -> str:
    return Tokenizer(PackManifest.tokenizer_path(prefix)).decode(PackedIndex(prefix)[0][0].tokens)


def test_the_tokenizers_own_template_comes_along(chat_tokenizer: Path, options: dict) -> None:
    manifest = pack_sft(PackOptions(**options, tokenizer=chat_tokenizer))
    folder = PackManifest.tokenizer_path(options["output"])
    assert tokenizer_fingerprint(folder) == manifest.tokenizer.fingerprint
    assert (folder / "tokenizer_config.json").read_bytes() == (chat_tokenizer / "tokenizer_config.json").read_bytes()
    assert (folder / "chat_template.jinja").read_text() == CHATML
    assert packed_text(options["output"]) == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tokenize=False
    )


@pytest.mark.parametrize("template", [CHATML_WITH_SPANS, LLAMA])
def test_a_template_file_for_a_tokenizer_without_one_comes_along(
    template: str, bare_tokenizer: Path, options: dict, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    pack_sft(PackOptions(**options, tokenizer=bare_tokenizer, chat_template=tmp_path / "own.jinja"))
    folder = PackManifest.tokenizer_path(options["output"])
    assert (folder / "chat_template.jinja").read_text() == template
    assert (folder / "tokenizer_config.json").read_bytes() == (bare_tokenizer / "tokenizer_config.json").read_bytes()
    assert packed_text(options["output"]) == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tokenize=False
    )
    # What was carried packs the same again, now as the tokenizer's own template.
    again = options | {"output": tmp_path / "again"}
    pack_sft(PackOptions(**again, tokenizer=folder))
    for kind in ("bin", "idx", "sft"):
        assert Path(f"{again['output']}.{kind}").read_bytes() == Path(f"{options['output']}.{kind}").read_bytes()


@pytest.mark.parametrize(
    "other", ["other", [{"name": "default", "template": "other"}, {"name": "rag", "template": "r"}]]
)
def test_another_template_of_the_tokenizer_does_not_come_along(
    other: object, chat_tokenizer: Path, options: dict, tmp_path: Path
) -> None:
    tokenizer = edit_config(chat_tokenizer, tmp_path / "other", chat_template=other)
    (tmp_path / "own.jinja").write_text(CHATML)
    pack_sft(PackOptions(**options, tokenizer=tokenizer, chat_template=tmp_path / "own.jinja"))
    folder = PackManifest.tokenizer_path(options["output"])
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    config, before = (json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, tokenizer))
    assert before.pop("chat_template") and config == before


def test_the_ends_of_turns_are_noted_the_most_frequent_first(
    chat_tokenizer: Path, options: dict, tmp_path: Path
) -> None:
    eot, im_end = (4 + SPECIAL_TOKENS.index(name) for name in ("<|eot|>", "<|im_end|>"))
    assert pack_sft(PackOptions(**options, tokenizer=chat_tokenizer)).end_of_turn_ids == [im_end]
    (tmp_path / "two.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content + ('<|eot|>' if message.content == 'two' else '<|im_end|>') }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + message.content }}{% endif %}{% endfor %}"
    )
    chats = [CHAT[:3], CHAT[1:3], CHAT]
    options["input"][0].write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    two = options | {"output": tmp_path / "two", "chat_template": tmp_path / "two.jinja"}
    assert pack_sft(PackOptions(**two, tokenizer=chat_tokenizer)).end_of_turn_ids == [eot, im_end]
    assert PackManifest.read(tmp_path / "two").end_of_turn_ids == [eot, im_end]


def test_pairs_carry_the_tokenizer_alone(bare_tokenizer: Path, options: dict) -> None:
    pairs = options | {"prompt_column": "prompt", "response_column": "response", "tokenizer": bare_tokenizer}
    manifest = pack_sft(PackOptions(**pairs))
    assert manifest.end_of_turn_ids == [Tokenizer(bare_tokenizer).eos_id]
    assert sorted(manifest.tokenizer_checksums) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_damaged_or_missing_file_of_the_tokenizer_is_found(name: str, chat_tokenizer: Path, options: dict) -> None:
    pack_sft(PackOptions(**options, tokenizer=chat_tokenizer))
    path = PackManifest.tokenizer_path(options["output"]) / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=rf"sft\.tokenizer/{name}: damaged"):
        pack_sft(PackOptions(**options, tokenizer=chat_tokenizer))
    path.unlink()
    with pytest.raises(UserError, match=rf"sft\.tokenizer/{name}: missing"):
        PackedIndex(options["output"]).verify()


def test_an_index_of_an_earlier_version_is_still_read_and_found_done(
    chat_tokenizer: Path, options: dict, capsys: pytest.CaptureFixture
) -> None:
    manifest = pack_sft(PackOptions(**options, tokenizer=chat_tokenizer))
    path = PackManifest.path(options["output"])
    content = json.loads(path.read_text())
    for name in ("tokenizer_checksums", "end_of_turn_ids", "chat_template_kwargs"):
        del content[name]
    del content["counts"]["skipped_example"]
    path.write_text(json.dumps(content))
    for file in (folder := PackManifest.tokenizer_path(options["output"])).iterdir():
        file.unlink()
    folder.rmdir()
    old = PackManifest.read(options["output"])
    assert (old.settings, old.end_of_turn_ids) == (manifest.settings, [])
    capsys.readouterr()
    assert pack_sft(PackOptions(**options, tokenizer=chat_tokenizer)) == old
    assert "carries no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_that_the_model_alone_names_is_kept(name: str, chat_tokenizer: Path, tmp_path: Path) -> None:
    folder = edit_config(chat_tokenizer, tmp_path / "model", eos_token=None)
    (folder / name).write_text(json.dumps({"eos_token_id": [5, 0]}))
    files = read_tokenizer_files(folder)
    assert name not in files
    (tmp_path / "copy").mkdir()
    for file, content in files.items():
        (tmp_path / "copy" / file).write_bytes(content)
    assert Tokenizer(tmp_path / "copy").eos_id == Tokenizer(folder).eos_id == 5
