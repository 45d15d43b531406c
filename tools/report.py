"""`tpt-report` from a checkout: see megatron_tpt/tools/report.py."""

from megatron_tpt.tools.report import command

if __name__ == "__main__":
    command()
