"""Merge indices (.bin/.idx) into one, without tokenising again.

python tools/merge_index.py --input "data/shard-*" --output data/train
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.merge_options import MergeOptions


def main() -> None:
    options = parse(MergeOptions, description=__doc__)
    from megatron_tpt.indexing.merge import merge

    merge(options)


command = program(main)

if __name__ == "__main__":
    command()
