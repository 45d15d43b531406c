"""`tpt-convert-tokenizer` from a checkout: see megatron_tpt/tools/convert_tokenizer.py."""

from megatron_tpt.tools.convert_tokenizer import command

if __name__ == "__main__":
    command()
