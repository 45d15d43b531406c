"""`tpt-evaluate` from a checkout: see megatron_tpt/tools/evaluate.py."""

from megatron_tpt.tools.evaluate import command

if __name__ == "__main__":
    command()
