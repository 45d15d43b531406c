"""Run an experiment: steps with every combination of its factors, each once, and a report with intervals.

python tools/study.py study.yaml --output runs/study --dry-run              # the steps, their tokens, FLOPs and hours
python tools/study.py study.yaml --output runs/study --num-workers 2        # what is missing, then the report
python tools/study.py study.yaml --output runs/study --executor slurm       # as jobs that wait for each other
python tools/study.py study.yaml --output runs/study --status
python tools/study.py study.yaml --output runs/study --report               # the report again, from the folders
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.studies.options import StudyOptions


def main() -> None:
    options = parse(StudyOptions, description=__doc__)
    from megatron_tpt.studies.run import run_study

    run_study(options)


command = program(main)

if __name__ == "__main__":
    command()
