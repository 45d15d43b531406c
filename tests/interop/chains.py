"""A base model as Qwen2.5's, and training in this process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_tpt import finetune, pretrain
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer

TEACHER = Path(__file__).parents[2] / "examples" / "demo" / "teacher"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 2}


def base_tokenizer(folder: Path) -> Path:
    """Documents end with <|endoftext|>; <|im_end|> is only a token of chats."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def with_template(tokenizer: Path, folder: Path) -> Path:
    """A copy that has a chat template."""
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def pack_chats(tokenizer: Path, prefix: Path, end: str = "<|im_end|>") -> Path:
    """Chats that a small model learns in some dozens of steps, packed; the index carries tokenizer and end of turn."""
    chats = prefix.with_suffix(".jsonl")
    turns = [({"role": "user", "content": f"a+{i % 7}"}, {"role": "assistant", "content": "Tue"}) for i in range(100)]
    chats.write_text("".join(json.dumps({"messages": list(messages)}) + "\n" for messages in turns))
    pack_sft(PackOptions(input=[chats], tokenizer=tokenizer, output=prefix, sequence_length=64))
    path = PackManifest.path(prefix)
    [id] = Tokenizer(tokenizer, parse_special_tokens=True).encode(end)
    path.write_text(json.dumps({**json.loads(path.read_text()), "end_of_turn_ids": [id]}))
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    shutil.copytree(tokenizer, f"{prefix}.tokenizer")
    return prefix


def train(monkeypatch: pytest.MonkeyPatch, program: Any, folder: Path, num_steps: int, **sections: Any) -> Path:
    """Run a training program in this process. Returns its last checkpoint."""
    training = {"num_steps": num_steps, "sequence_length": 64, "global_batch_size": 4, "dtype": "float32"}
    recipe = {
        "optimizer": {"learning_rate": 5e-3, "schedule": "constant"},
        "logging": {"tensorboard": False},
        **sections,
        "training": {**training, **sections.get("training", {})},
        "run": {"output_dir": str(folder)},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["train", str(path)])
    program.main()
    return folder / "checkpoints" / "latest"


PRETRAIN, FINETUNE = pretrain, finetune
