"""`tpt-prepare` from a checkout: see megatron_tpt/tools/prepare.py."""

from megatron_tpt.tools.prepare import command

if __name__ == "__main__":
    command()
