"""What ends a completion, defaults of sampling, and chat templates survive import, training and export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chains import FINETUNE, PRETRAIN, SHAPE, TEMPLATE, base_tokenizer, pack_chats, train, with_template
from safetensors.torch import load_file

from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.hf_import import import_hf
from megatron_tpt.interop.options import ExportOptions, ImportOptions
from megatron_tpt.records import Record, write_records


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_tokenizer(tmp_path_factory.mktemp("qwen") / "tokenizer")


@pytest.fixture(scope="module")
def chats(tokenizer: Path) -> Path:
    """Packed with a tokenizer that has the template; `tokenizer` has none."""
    return pack_chats(with_template(tokenizer, tokenizer.with_name("chat")), tokenizer.with_name("sft"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def id_of(tokenizer: Path, name: str) -> int:
    return Tokenizer(tokenizer, parse_special_tokens=True).encode(name)[0]


def hf_model(folder: Path, tokenizer: Path, generation: dict | None, **config: Any) -> Path:
    """A chat model as a Hub folder, of the size of the tests'."""
    torch.manual_seed(0)
    shape = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=2, **config))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def exported(checkpoint: Path, folder: Path) -> Path:
    export_hf(ExportOptions(checkpoint, folder))
    return folder


def test_a_chat_model_of_our_own_chain_stops_at_the_end_of_its_turn(
    chats: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pre-training without a template -> fine-tuning without data.tokenizer -> export -> transformers' generate."""
    write_records(tmp_path / "docs.jsonl", [Record(str(i), f"Day {i} is fine") for i in range(60)])
    index(IndexOptions(input=[tmp_path / "docs.jsonl"], tokenizer=tokenizer, output=tmp_path / "docs"))
    data = {"data": {"train": str(tmp_path / "docs")}}
    base = train(monkeypatch, PRETRAIN, tmp_path / "base", 2, model=SHAPE, **data)
    start = {"training": {"init_from": str(base)}, "data": {"train": str(chats)}}
    tuned = train(monkeypatch, FINETUNE, tmp_path / "tuned", 40, **start)
    end, eos = id_of(tokenizer, "<|im_end|>"), Tokenizer(tokenizer).eos_id
    assert read(exported(base, tmp_path / "base-hf") / "generation_config.json")["eos_token_id"] == eos

    folder = exported(tuned, tmp_path / "hf")
    assert read(folder / "generation_config.json")["eos_token_id"] == [end, eos]
    assert read(folder / "config.json")["eos_token_id"] == [end, eos]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token, theirs.chat_template) == ("<|im_end|>", TEMPLATE)
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": "a+3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(**ids, max_new_tokens=30)[0, ids["input_ids"].shape[1] :]
    assert theirs.decode(answer) == "Tue<|im_end|>"
    # Checkpoints still keep the tokenizer of the documents, which further training data has.
    assert Tokenizer(tuned / "tokenizer").eos_id == eos

    more = train(monkeypatch, PRETRAIN, tmp_path / "more", 1, training={"init_from": str(tuned)}, **data)
    assert read(more / "generation_config.json")["eos_token_id"] == [end, eos]
    assert (more / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_chat_models_settings_survive_import_fine_tuning_and_resume(
    chats: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [7, Tokenizer(tokenizer).eos_id]
    generation = {"eos_token_id": ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": 3}
    fields = {"eos_token_id": ends, "pad_token_id": 9, "my_note": {"license": "mit"}}
    source = hf_model(tmp_path / "source", with_template(tokenizer, tmp_path / "t"), generation, **fields)
    import_hf(ImportOptions(source, tmp_path / "imported"))
    back = exported(tmp_path / "imported", tmp_path / "back")
    assert read(back / "generation_config.json") == generation
    config = read(back / "config.json")
    assert {name: config[name] for name in fields} == fields
    assert Tokenizer(back).eos_id == Tokenizer(source).eos_id

    start = {"training": {"init_from": str(tmp_path / "imported")}, "data": {"train": str(chats)}}
    train(monkeypatch, FINETUNE, tmp_path / "tuned", 1, **start)
    checkpoint = train(monkeypatch, FINETUNE, tmp_path / "tuned", 2, **start)
    end = id_of(tokenizer, "<|im_end|>")
    folder = exported(checkpoint, tmp_path / "hf")
    assert read(folder / "generation_config.json") == {**generation, "eos_token_id": [end, *ends]}
    config = read(folder / "config.json")
    assert {name: config[name] for name in fields} == {**fields, "eos_token_id": [end, *ends]}
    assert (config["vocab_size"], len(load_file(folder / "model.safetensors")["lm_head.weight"])) == (640, 640)


def test_without_generation_config_the_ends_of_config_json_count(tokenizer: Path, tmp_path: Path) -> None:
    source = hf_model(tmp_path / "source", tokenizer, None, eos_token_id=5, bos_token_id=None)
    import_hf(ImportOptions(source, tmp_path / "imported"))
    folder = exported(tmp_path / "imported", tmp_path / "hf")
    assert read(folder / "generation_config.json") == {"eos_token_id": 5}
    config = read(folder / "config.json")
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (5, None, None)


def test_what_is_not_carried_over_is_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hf_model(tmp_path / "source", tokenizer, None, my_note="x", auto_map={"AutoModel": "own.Own"})
    for name in ("adapter_model.safetensors", "preprocessor_config.json", "modeling_own.py"):
        (source / name).write_text("{}")
    import_hf(ImportOptions(source, tmp_path / "imported"))
    output = capsys.readouterr()
    assert f"warning: {source}: adapter_model.safetensors: an adapter is not part" in output.err
    for words in ("auto_map: the model's own code", "my_note"):
        assert words in output.out
    assert "not carried over: modeling_own.py, preprocessor_config.json\n" in output.out
    assert "auto_map" not in read(exported(tmp_path / "imported", tmp_path / "hf") / "config.json")


def test_chats_without_an_end_of_turn_are_warned_of(
    chats: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index of an earlier version, and one packed with another template than the tokenizer's."""
    for file in chats.parent.glob(f"{chats.name}.*"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    manifest = tmp_path / f"{chats.name}.sft.json"
    of_later_versions = ("end_of_turn_ids", "tokenizer_checksums")
    manifest.write_text(
        json.dumps({name: value for name, value in read(manifest).items() if name not in of_later_versions})
    )
    template = with_template(tokenizer, tmp_path / "other")
    (template / "chat_template.jinja").write_text(TEMPLATE + " ")
    data = {"train": [str(tmp_path / chats.name), str(chats)], "tokenizer": str(template)}
    checkpoint = train(monkeypatch, FINETUNE, tmp_path / "tuned", 1, model=SHAPE, data=data)
    output = capsys.readouterr().out
    assert f"warning: {manifest} names no token that ends a turn" in output
    assert (
        f"warning: data was packed with the chat template of {chats}.tokenizer, and checkpoints keep another" in output
    )
    assert (checkpoint / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE + " "


def test_token_ids_follow_their_names_into_another_tokenizer(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"<|reserved_{i}|>" for i in range(3)]
    own = transformers.AutoTokenizer.from_pretrained(tokenizer)
    own.add_special_tokens({"additional_special_tokens": names})
    own.save_pretrained(tmp_path / "other")  # <|im_end|> is the same, the reserved ones are new here
    generation = {"eos_token_id": [id_of(tmp_path / "other", names[1]), id_of(tokenizer, "<|im_end|>")]}
    source = hf_model(
        tmp_path / "source", tmp_path / "other", generation, pad_token_id=id_of(tmp_path / "other", names[2])
    )
    import_hf(ImportOptions(source, tmp_path / "imported"))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    start = {"init_from": str(tmp_path / "imported"), "allow_other_tokenizer": True}
    data = {"train": str(tmp_path / "pairs.jsonl"), "tokenizer": str(tokenizer)}
    checkpoint = train(monkeypatch, FINETUNE, tmp_path / "tuned", 1, training=start, data=data)
    assert read(checkpoint / "generation_config.json")["eos_token_id"] == [id_of(tokenizer, "<|im_end|>")]
    assert "pad_token_id" not in read(checkpoint / "hf_config.json")
    assert "pad_token_id=" in capsys.readouterr().out
