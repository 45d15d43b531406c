"""Turn a checkpoint into a Hugging Face folder that transformers and vLLM load.

python tools/export_hf.py --checkpoint RUN/checkpoints/latest --output DIR
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.interop.options import ExportOptions


def main() -> None:
    options = parse(ExportOptions, description=__doc__)
    from megatron_tpt.interop.hf_export import export_hf

    export_hf(options)


if __name__ == "__main__":
    run(main)
