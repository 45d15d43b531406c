"""What the random driver works on: small inputs of every kind, and ways to damage files and command lines."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
import zstandard
from chat_templates import CHATML

WORDS = [first + second for first in ("ba", "ke", "lo", "mi", "su") for second in ("n", "rt", "sh", "ga", "le")]
MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2, "num_query_groups": 2}
LENGTHS = {"num_steps": 12, "dtype": "float32", "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 2}
# Half of them are wrong everywhere; none makes a job large, leaves the scratch folder, or asks the network.
VALUES = (
    "", "0", "-1", "1", "3", "7.5", "nan", "1e999", "none", "null", "true", "é", "a\nb", "\udcff", "../x", ".",
    "missing/x", "{", "[1", "*", "~", "-", "--", "text,id", "0x10", "1KiB", "999TiB", "chat.jinja", "documents/a.jsonl",
    "out", "out/job", "[]", "{}", "[1, 2]", "!!python/object:os.system", "&a [*a]", "x" * 300,
)  # fmt: skip


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)).capitalize() + "."


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)


def write_inputs(folder: Path) -> None:
    """Fill `folder`, which must be the one that the tools will see: indices remember where their tokenizer is."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [
        {
            "id": f"d{i}",
            "text": _text(rng, rng.randint(5, 40)),
            "thinking": _text(rng, 20) if i % 3 else None,
            "meta": {},
        }
        for i in range(80)
    ]
    rows[7]["text"] = rows[3]["text"]
    _lines(folder / "documents/a.jsonl", rows[:40])
    _lines(folder / "documents/b.jsonl.zst", rows[40:])
    turns = [
        [{"role": "user", "content": _text(rng, 5)}, {"role": "assistant", "content": _text(rng, 9)}] for _ in rows
    ]
    _lines(folder / "chats.jsonl", [{"messages": messages} for messages in turns])
    _lines(folder / "pairs.jsonl", [{"prompt": _text(rng, 5), "response": _text(rng, 9)} for _ in rows])
    (folder / "chat.jinja").write_text(CHATML)
    (folder / "bare.txt").write_text("{document}")
    _make_stages(folder)
    common = {"model": MODEL, "training": LENGTHS, "checkpoint": {"save_interval": 3}}
    common["logging"] = {"log_interval": 1, "tensorboard": False}
    data = {"pretrain": {"train": ["index/a", "index/b"]}, "finetune": {"train": "index/sft", "tokenizer": "tokenizer"}}
    for program, section in data.items():
        recipe = {"run": {"output_dir": "out/run"}, **common, "data": section}
        (folder / f"{program}.yaml").write_text(yaml.safe_dump(recipe))


def _make_stages(folder: Path) -> None:
    """What later stages read, made by the earlier ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tpt.indexing.index import index
    from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
    from megatron_tpt.indexing.pack_sft import pack_sft
    from megatron_tpt.indexing.packing_options import PackOptions
    from megatron_tpt.indexing.train_tokenizer import train_tokenizer
    from megatron_tpt.interop.hf_import import import_hf
    from megatron_tpt.interop.options import ImportOptions

    tokenizer, documents = folder / "tokenizer", folder / "documents"
    special = ["<|im_start|>", "<|im_end|>"]
    train_tokenizer(
        TrainTokenizerOptions(
            [documents], tokenizer, vocab_size=320, special_tokens=special, chat_template=folder / "chat.jinja"
        )
    )
    for name, file in {"a": "a.jsonl", "b": "b.jsonl.zst"}.items():
        index(IndexOptions([documents / file], tokenizer, folder / "index" / name))
    pack_sft(PackOptions([folder / "chats.jsonl"], tokenizer, folder / "index/sft", sequence_length=64))
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in tokenizer.iterdir():
        shutil.copy2(file, folder / "model")
    import_hf(ImportOptions(folder / "model", folder / "checkpoint"))


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage a file in one way, and say which."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        return _damage_json(path, rng)
    name = rng.choice(list(_DAMAGES))
    _DAMAGES[name](path, rng)
    return name


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 20) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _recode(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("utf-8", "replace") + "é"
    path.write_bytes(text.encode(rng.choice(["utf-16", "utf-8-sig", "latin-1"]), "replace"))


def _replace(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, rng: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


_DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "bytes flipped": _flip,
    "truncated": lambda path, rng: os.truncate(path, int(path.stat().st_size * rng.random())),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "garbage at its end": lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99))),
    "zeros at its start": lambda path, rng: path.write_bytes(bytes(64) + path.read_bytes()[64:]),
    "another encoding": _recode,
    "CR LF": lambda path, rng: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "twice": lambda path, rng: path.write_bytes(path.read_bytes() * 2),
    "deleted": _replace(lambda path: None),
    "a folder": _replace(lambda path: path.mkdir()),
    "a link to nothing": _replace(lambda path: path.symlink_to("nothing")),
    "a link to itself": _replace(lambda path: path.symlink_to(path.name)),
    "renamed": lambda path, rng: path.rename(
        path.with_suffix(rng.choice([".gz", ".zst", ".parquet", ".txt", ".jsonl"]))
    ),
}


def _damage_json(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a random value of a random line, or of the file, of JSON."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    holder, key = rng.choice(list(_places(value)))
    depth = rng.choice([3, 200, 3000])
    new = rng.choice([
        "null", "7", "-1", "1e999", "NaN", "true", '""', "[]", "{}", "[null]", '{"a": [1, {}]}', '"\\ud800"',
        '"\\u0000"', '"x"', "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, f'"{"y" * 100_000}"',
        "1" * 5000,
    ])  # fmt: skip
    if rng.random() < 0.15:
        del holder[key]
        change = "removed"
    else:
        holder[key] = "@@"
        change = f"is {new[:20]}"
    lines[number] = json.dumps(value).replace('"@@"', new)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}, {key!r} {change}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys[:20] for place in _places(value[key])]


def damage_arguments(arguments: list[str], options: list[str], rng: random.Random) -> list[str]:
    """`arguments` with something wrong, missing, given twice or contradictory; `options` are all that there are."""
    arguments = list(arguments)
    for _ in range(rng.choice([1, 1, 2])):
        given = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
        at = rng.choice(given) if given else 0
        option, value = rng.choice(options), rng.choice(VALUES)
        match rng.randrange(6):
            case 0:
                del arguments[at : at + 2]
            case 1:
                arguments += arguments[at : at + 2]
            case 2 if given:
                arguments[at + 1 : at + 2] = [value]
            case 3:
                arguments.insert(rng.randint(0, len(arguments)), rng.choice(["--wokers", "-x", value]))
            case _:
                is_field = "." in option and "_" in option
                arguments += [f"{option}={value}"] if is_field or rng.random() < 0.3 else [option, value]
    return arguments
