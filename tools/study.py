"""`tpt-study` from a checkout: see megatron_tpt/tools/study.py."""

from megatron_tpt.tools.study import command

if __name__ == "__main__":
    command()
