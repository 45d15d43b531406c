"""`tpt-train-tokenizer` from a checkout: see megatron_tpt/tools/train_tokenizer.py."""

from megatron_tpt.tools.train_tokenizer import command

if __name__ == "__main__":
    command()
