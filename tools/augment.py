"""`tpt-augment` from a checkout: see megatron_tpt/tools/augment.py."""

from megatron_tpt.tools.augment import command

if __name__ == "__main__":
    command()
