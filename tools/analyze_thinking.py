"""`tpt-analyze-thinking` from a checkout: see megatron_tpt/tools/analyze_thinking.py."""

from megatron_tpt.tools.analyze_thinking import command

if __name__ == "__main__":
    command()
