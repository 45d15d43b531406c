"""Show what an index holds, decode one of its documents, or verify it.

python tools/inspect_index.py data/train

python tools/inspect_index.py data/train --document 3

python tools/inspect_index.py data/train --verify
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.indexing.options import InspectOptions


def main() -> None:
    options = parse(InspectOptions, description=__doc__)
    from megatron_tpt.indexing.inspection import inspect_index

    inspect_index(options)


if __name__ == "__main__":
    run(main)
