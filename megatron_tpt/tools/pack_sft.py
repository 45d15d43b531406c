"""Pack conversations, or prompts and responses, into rows of a fixed length for fine-tuning.

python tools/pack_sft.py --input chats.jsonl.zst --tokenizer DIR --output data/sft --sequence-length 32768

python tools/pack_sft.py --input chats --tokenizer DIR --chat-template chat.jinja --output sft --sequence-length 4096

python tools/pack_sft.py --recipe pack.yaml --prompt-column question --response-column answer --num-workers 16

python tools/inspect_index.py data/sft --document 0
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.packing_options import PackOptions


def main() -> None:
    options = parse(PackOptions, description=__doc__)
    from megatron_tpt.indexing.pack_sft import pack_sft

    pack_sft(options)


command = program(main)

if __name__ == "__main__":
    command()
