"""Let a model think about every document, and write the documents with their thinking in shards.

python tools/augment.py --input documents.jsonl --output data/thinking --model MODEL_DIR
python tools/augment.py --recipe augment.yaml --estimate 200                     # what would it cost?
python tools/augment.py --recipe augment.yaml --executor slurm --num-tasks 64    # the same, as a job array
python tools/augment.py --recipe augment.yaml --status                           # how far is it?
python tools/augment.py --recipe augment.yaml --retry-rejects "engine_*"         # retry some rejects
python tools/augment.py --recipe augment.yaml --refilter --filters.min-words 4   # other filters, nothing generated
"""

import sys

from megatron_tpt.config.cli import parse, program
from megatron_tpt.logs import print_result
from megatron_tpt.thinking.options import AugmentOptions


def main() -> None:
    options = parse(AugmentOptions, description=__doc__)
    if options.status:
        from megatron_tpt.thinking.status import status

        print_result(status(options).screen())
    elif options.refilter:
        from megatron_tpt.thinking.augment import apply_filters

        apply_filters(options)
    elif options.estimate is not None:
        from megatron_tpt.thinking.estimate import estimate

        print_result(estimate(options).summary())
    elif options.task is None and options.scale.is_split:
        from megatron_tpt.thinking.augment import conclude, launch

        report = launch(options, [sys.executable, *sys.argv])
        if report.exit_code:
            sys.exit(report.exit_code)
        conclude(options)
    else:
        from megatron_tpt.thinking.augment import augment

        augment(options)


command = program(main)

if __name__ == "__main__":
    command()
