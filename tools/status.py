"""`tpt-status` from a checkout: see megatron_tpt/tools/status.py."""

from megatron_tpt.tools.status import command

if __name__ == "__main__":
    command()
