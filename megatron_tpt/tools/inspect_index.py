"""Show what an index holds, decode one of its documents with what is learned, verify it, or compare it with another.

python tools/inspect_index.py data/train

python tools/inspect_index.py data/train --document 3

python tools/inspect_index.py data/sft --document 0

python tools/inspect_index.py data/train --verify --json

python tools/inspect_index.py data/train --compare data/other
"""

import sys

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.inspection_options import InspectOptions


def main() -> None:
    options = parse(InspectOptions, description=__doc__)
    from megatron_tpt.indexing.inspection import inspect_index

    if not inspect_index(options):
        sys.exit(1)


command = program(main)

if __name__ == "__main__":
    command()
