"""`tpt-plan` from a checkout: see megatron_tpt/tools/plan.py."""

from megatron_tpt.tools.plan import command

if __name__ == "__main__":
    command()
