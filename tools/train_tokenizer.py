"""Train a byte-level BPE tokenizer on documents.

python tools/train_tokenizer.py --input documents.jsonl --vocab-size 16384 --output TOKENIZER_DIR
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.indexing.options import TrainTokenizerOptions


def main() -> None:
    options = parse(TrainTokenizerOptions, description=__doc__)
    from megatron_tpt.indexing.train_tokenizer import train_tokenizer

    train_tokenizer(options)


if __name__ == "__main__":
    run(main)
