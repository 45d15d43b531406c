"""Turn documents, or documents with their thinking, into the .bin/.idx that Megatron Core trains on.

python tools/index.py --input documents.jsonl --tokenizer TOKENIZER_DIR --output data/train
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.options import IndexOptions


def main() -> None:
    options = parse(IndexOptions, description=__doc__)
    from megatron_tpt.indexing.index import index_shards

    index_shards(options)


command = program(main)

if __name__ == "__main__":
    command()
