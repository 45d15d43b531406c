"""An index of real text for machines that have none: the documentation and the sources of installed packages.

python -m benchmarks.gpu.real_text --output DIR
"""

import json
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run

PACKAGES = ("transformers", "torch", "datasets", "numpy")


@dataclass(frozen=True)
class TextOptions:
    """How much text, and where it goes."""

    output: Path
    """Folder to make, with `text.bin`, `text.idx`, `text.json` and `tokenizer`."""
    num_bytes: int = 16_000_000
    """Of text, about a quarter as many tokens."""
    vocab_size: int = 8192
    """Of the tokenizer, which is trained on the text."""


def documents(num_bytes: int) -> Iterator[str]:
    """Files of text that are not tiny, about `num_bytes` of them, the same on every call."""
    site = Path(sysconfig.get_paths()["purelib"])
    for path in (path for name in PACKAGES for path in sorted((site / name).rglob("*.py"))):
        text = path.read_text(errors="replace")
        if len(text) > 2000:
            yield text
            num_bytes -= len(text)
            if num_bytes < 0:
                return


def make_index(options: TextOptions) -> Path:
    """Returns the prefix of the index."""
    from megatron_tpt.indexing.index import index
    from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
    from megatron_tpt.indexing.train_tokenizer import train_tokenizer

    prefix = options.output / "text"
    if prefix.with_suffix(".json").exists():
        return prefix
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "text.jsonl"
        raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(options.num_bytes)))
        tokenizer = options.output / "tokenizer"
        if not tokenizer.exists():  # a call that was ended may have left it
            train_tokenizer(TrainTokenizerOptions(input=[raw], output=tokenizer, vocab_size=options.vocab_size))
        index(IndexOptions(input=[raw], tokenizer=tokenizer, output=prefix))
    return prefix


if __name__ == "__main__":
    run(lambda: make_index(parse(TextOptions)))
