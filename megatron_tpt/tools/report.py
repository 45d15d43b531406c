"""Write one page about training runs that any browser opens: curves, data, samples, checkpoints, environment.

python tools/report.py runs/first/run --output report.html

python tools/report.py runs/with-thinking runs/without --x tokens
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.monitoring.report_options import ReportOptions


def main() -> None:
    options = parse(ReportOptions, description=__doc__)
    from megatron_tpt.monitoring.report import write_report

    write_report(options)


command = program(main)

if __name__ == "__main__":
    command()
