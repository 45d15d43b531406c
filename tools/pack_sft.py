"""`tpt-pack-sft` from a checkout: see megatron_tpt/tools/pack_sft.py."""

from megatron_tpt.tools.pack_sft import command

if __name__ == "__main__":
    command()
