"""Let models answer problems, check the answers, and report accuracy with its standard error.

python tools/evaluate.py --model MODEL_DIR --data problems.jsonl --output results/
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.evaluation.options import EvaluateOptions


def main() -> None:
    options = parse(EvaluateOptions, description=__doc__)
    from megatron_tpt.evaluation.evaluate import evaluate

    evaluate(options)


if __name__ == "__main__":
    run(main)
