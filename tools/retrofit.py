"""`tpt-retrofit` from a checkout: see megatron_tpt/tools/retrofit.py."""

from megatron_tpt.tools.retrofit import command

if __name__ == "__main__":
    command()
