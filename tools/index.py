"""Turn documents, or documents with their thinking, into the .bin/.idx that Megatron Core trains on.

python tools/index.py --input documents.jsonl --tokenizer TOKENIZER_DIR --output data/train
"""

import sys

from megatron_tpt.config.cli import parse, run
from megatron_tpt.indexing.options import IndexOptions


def without_pandas() -> None:
    """Have pyarrow believe that pandas is absent: it imports it with the first array, 0.3 s for nothing here."""
    import pyarrow

    if "pandas" not in sys.modules:
        sys.modules["pandas"] = None  # type: ignore[assignment]
        pyarrow.array([0])
        del sys.modules["pandas"]


def main() -> None:
    options = parse(IndexOptions, description=__doc__)
    without_pandas()
    from megatron_tpt.indexing.index import index_shards

    index_shards(options)


if __name__ == "__main__":
    run(main)
