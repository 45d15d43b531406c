"""Run a command with several seeds, and report the arms side by side with their intervals.

python tools/study.py examples/demo/study.yaml --output runs/study
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.studies.options import StudyOptions


def main() -> None:
    options = parse(StudyOptions, description=__doc__)
    from megatron_tpt.studies.study import run_study

    run_study(options)


command = program(main)

if __name__ == "__main__":
    command()
