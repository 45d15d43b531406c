"""`tpt-export-hf` from a checkout: see megatron_tpt/tools/export_hf.py."""

from megatron_tpt.tools.export_hf import command

if __name__ == "__main__":
    command()
