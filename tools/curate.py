"""`tpt-curate` from a checkout: see megatron_tpt/tools/curate.py."""

from megatron_tpt.tools.curate import command

if __name__ == "__main__":
    command()
