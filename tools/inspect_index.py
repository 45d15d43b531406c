"""`tpt-inspect-index` from a checkout: see megatron_tpt/tools/inspect_index.py."""

from megatron_tpt.tools.inspect_index import command

if __name__ == "__main__":
    command()
