"""`tpt-import-hf` from a checkout: see megatron_tpt/tools/import_hf.py."""

from megatron_tpt.tools.import_hf import command

if __name__ == "__main__":
    command()
