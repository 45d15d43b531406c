"""Turn a checkpoint into a Hugging Face folder that transformers and vLLM load.

python tools/export_hf.py --checkpoint RUN/checkpoints/latest --output DIR
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.interop.options import ExportOptions


def main() -> None:
    options = parse(ExportOptions, description=__doc__)
    from megatron_tpt.interop.hf_export import export_hf

    export_hf(options)


command = program(main)

if __name__ == "__main__":
    command()
