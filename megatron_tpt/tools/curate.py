"""Curate data sets: clean them as tools/prepare.py does, annotate the documents, and make strata of them.

python tools/curate.py --input base=web/ qa=problems.jsonl:question,answer --output curated/ --annotate domain language
python tools/curate.py --recipe front_loading.yaml --output curated/
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.corpus.curate_options import CurateOptions


def main() -> None:
    options = parse(CurateOptions, description=__doc__)
    from megatron_tpt.corpus.curate import curate

    curate(options)


command = program(main)

if __name__ == "__main__":
    command()
