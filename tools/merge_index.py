"""`tpt-merge-index` from a checkout: see megatron_tpt/tools/merge_index.py."""

from megatron_tpt.tools.merge_index import command

if __name__ == "__main__":
    command()
