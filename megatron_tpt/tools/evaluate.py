"""Let models answer problems, check the answers, and report accuracy with its standard error; measure perplexity.

python tools/evaluate.py --model MODEL_DIR --data problems.jsonl --output results/
python tools/evaluate.py --model RECURRENT_DIR --documents texts.jsonl --recurrences 1,2,4,8 --output results/
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.evaluation.options import EvaluateOptions


def main() -> None:
    options = parse(EvaluateOptions, description=__doc__)
    from megatron_tpt.evaluation.evaluate import evaluate

    evaluate(options)


command = program(main)

if __name__ == "__main__":
    command()
