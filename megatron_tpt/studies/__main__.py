"""`python -m megatron_tpt.studies FOLDER`: one step of a study, see step.py. Tasks of a study run this."""

import argparse
import sys
from pathlib import Path

from megatron_tpt.config.cli import run
from megatron_tpt.studies.step import run_step


def _main() -> None:
    parser = argparse.ArgumentParser(prog="megatron_tpt.studies", description="Run one step of a study.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", help="always 0: given by the executor")
    parser.add_argument("--num-tasks", help="always 1: given by the executor")
    sys.exit(run_step(parser.parse_args().folder))


if __name__ == "__main__":
    run(_main)
