"""Let models answer benchmarks, grade the answers, and report accuracy with its standard error; measure perplexity.

python tools/evaluate.py --model MODEL_DIR --data problems.jsonl --output results/
python tools/evaluate.py --model MODEL_DIR --benchmark tpt-reasoning --data-dir DATA_DIR --output results/
python tools/evaluate.py --model MODEL_DIR --benchmark mine.yaml --output results/ --num-samples 8 --temperature 0.6
python tools/evaluate.py --model RECURRENT_DIR --documents texts.jsonl --recurrences 1,2,4,8 --output results/
python tools/evaluate.py --run RUN --follow --benchmark gsm8k-base --output results/
"""

import sys

from megatron_tpt.config.cli import program
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks  # noqa: F401  (the reference of options)


def main() -> None:
    runs = parse_benchmarks(description=__doc__)
    if runs[0].run is not None:
        from megatron_tpt.tools._checkpoint_evaluation import evaluate_checkpoints

        evaluate_checkpoints(runs)
        return
    from megatron_tpt.evaluation.evaluate import evaluate

    evaluate(runs, [sys.executable, *sys.argv])


command = program(main)

if __name__ == "__main__":
    command()
