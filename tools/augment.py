"""Let a model think about every document, and write the documents with their thinking in shards.

python tools/augment.py --input documents.jsonl --output data/thinking --model MODEL_DIR
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.thinking.options import AugmentOptions


def main() -> None:
    options = parse(AugmentOptions, description=__doc__)
    from megatron_tpt.thinking.augment import augment

    augment(options)


if __name__ == "__main__":
    run(main)
