"""Compare how long the thinking about documents is, by columns of their metadata: tables and pictures.

python tools/analyze_thinking.py --input data/thinking --by domain,reasoning --output report/
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.thinking.analysis_options import AnalysisOptions


def main() -> None:
    options = parse(AnalysisOptions, description=__doc__)
    from megatron_tpt.thinking.analysis import analyze

    analyze(options)


command = program(main)

if __name__ == "__main__":
    command()
