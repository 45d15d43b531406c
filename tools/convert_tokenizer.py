"""Turn a SentencePiece model or a tiktoken file into a Hugging Face tokenizer folder that gives the same tokens.

python tools/convert_tokenizer.py --input model/tokenizer.model --output TOKENIZER_DIR [--sample documents.jsonl]
"""

from megatron_tpt.config.cli import parse, run
from megatron_tpt.indexing.options import ConvertTokenizerOptions


def main() -> None:
    options = parse(ConvertTokenizerOptions, description=__doc__)
    from megatron_tpt.indexing.convert_tokenizer import convert_tokenizer

    convert_tokenizer(options)


if __name__ == "__main__":
    run(main)
