"""Show what training runs and jobs are doing: step, loss, speed, time left, last checkpoint, warnings, sign of life.

python tools/status.py runs/first/run runs/first/thought

python tools/status.py runs --watch

python tools/status.py runs/first/run --json
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.monitoring.options import StatusOptions


def main() -> None:
    options = parse(StatusOptions, description=__doc__)
    from megatron_tpt.monitoring.status import show_status

    show_status(options)


command = program(main)

if __name__ == "__main__":
    command()
