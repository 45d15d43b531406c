"""Turn documents, or documents with their thinking, into the .bin/.idx that Megatron Core trains on.

python tools/index.py --input documents.jsonl --tokenizer TOKENIZER_DIR --output data/train
"""

import sys
import types
import warnings

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.options import IndexOptions


def without_pandas() -> None:
    """Have pyarrow pass over pandas, which it imports with its first array: 0.3 s for nothing here."""
    if "pandas" not in sys.modules:
        too_old = sys.modules["pandas"] = types.ModuleType("pandas")
        too_old.__version__ = "0"  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            import pyarrow

            pyarrow.array([0])
        del sys.modules["pandas"]


def main() -> None:
    options = parse(IndexOptions, description=__doc__)
    without_pandas()
    from megatron_tpt.indexing.index import index_shards

    index_shards(options)


command = program(main)

if __name__ == "__main__":
    command()
