"""Tiny Llama models with random weights, as real model folders, and one engine for a whole test module."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CORPUS = [
    "The ferry leaves at nine, and 24 people are waiting on the quay.",
    "If v7 = 3 and v2 = v7 + 5, then v2 = 8; multiply by 4 and you have 32.",
    "Copper conducts heat better than iron does. Why? Its electrons are freer to move.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCAB_SIZE = 384


def make_tokenizer(folder: Path, *, eos: bool = True, chat_template: str | None = None, thinks: bool = True) -> None:
    """Write a byte-level BPE tokenizer; with `thinks` its think tags are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", *(["<think>", "</think>"] if thinks else []), "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if eos:
        config["eos_token"] = "<|endoftext|>"
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(
    folder: Path, *, seed: int = 0, context: int = 512, chat_template: str | None = None, tied: bool = False
) -> str:
    """Write a 2-layer Llama of random weights with its tokenizer, and return its path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=tied,
        # Large weights, so that the choice of the next token is not a matter of rounding.
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undo what vLLM does to the environment variables, which programs started later would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
