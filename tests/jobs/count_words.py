"""Count the words of documents.

python count_words.py --input documents.jsonl --output counts
python count_words.py --input documents.jsonl --output counts --executor slurm --num-tasks 64
"""

import sys

from word_counts import WordCountOptions, count_words

from megatron_tpt.config.cli import parse, program


def main() -> None:
    sys.exit(count_words(parse(WordCountOptions, description=__doc__), [sys.executable, *sys.argv]))


command = program(main)

if __name__ == "__main__":
    command()
