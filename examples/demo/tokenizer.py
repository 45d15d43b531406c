"""The demo's tokenizer: byte-level BPE over whole words, so that `b+2` and `Thu` are one token each.

The usual rule cuts text at punctuation before it merges anything; here only white space separates words. Any text can
be encoded: a word that was never seen falls into pieces, at worst into bytes.

python examples/demo/tokenizer.py --input texts.jsonl --output TOKENIZER_DIR
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tpt.config.cli import parse, run
from megatron_tpt.files import atomic_directory
from megatron_tpt.json_data import pretty
from megatron_tpt.records import read_records

EOS, OPEN, CLOSE = "<|endoftext|>", "<think>", "</think>"
WORDS = Regex(r" ?[^\s]+|\s")


@dataclass(frozen=True)
class TokenizerOptions:
    """What to train on."""

    input: Path
    """Documents: JSON lines with the field `text`."""
    output: Path
    """The folder to make; it must not exist."""


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int = 1024) -> int:
    """Train on `texts` and save a Hugging Face tokenizer folder, which must not exist. Returns its vocabulary size."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, OPEN, CLOSE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] == EOS  # decoded text shows the tags
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    with atomic_directory(folder) as temporary:
        for name, content in (("tokenizer.json", description), ("tokenizer_config.json", config)):
            (temporary / name).write_bytes(pretty(content, indent=1))
    return backend.get_vocab_size()


def main() -> None:
    options = parse(TokenizerOptions, description=__doc__)
    make_tokenizer(options.output, [record.text for record in read_records([options.input])])


if __name__ == "__main__":
    run(main)
