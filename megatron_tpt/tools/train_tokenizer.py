"""Train a byte-level BPE tokenizer on documents.

python tools/train_tokenizer.py --input documents.jsonl --vocab-size 16384 --output TOKENIZER_DIR
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.options import TrainTokenizerOptions


def main() -> None:
    options = parse(TrainTokenizerOptions, description=__doc__)
    from megatron_tpt.indexing.train_tokenizer import train_tokenizer

    train_tokenizer(options)


command = program(main)

if __name__ == "__main__":
    command()
