"""Clean a corpus: drop bad records, duplicates and overlap with evaluation sets, and say what was dropped and why.

python tools/prepare.py --input raw/*.jsonl.zst --output clean/
python tools/prepare.py --input raw/ --output clean/ --deduplicate minhash --decontaminate gsm8k=test.jsonl:question
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.corpus.options import PrepareOptions


def main() -> None:
    options = parse(PrepareOptions, description=__doc__)
    from megatron_tpt.corpus.prepare import prepare

    prepare(options)


command = program(main)

if __name__ == "__main__":
    command()
