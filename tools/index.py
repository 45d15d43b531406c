"""`tpt-index` from a checkout: see megatron_tpt/tools/index.py."""

from megatron_tpt.tools.index import command

if __name__ == "__main__":
    command()
