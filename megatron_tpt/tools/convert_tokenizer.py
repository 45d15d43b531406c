"""Turn a SentencePiece model, a tiktoken file or a tekken.json into a Hugging Face folder that gives the same tokens.

python tools/convert_tokenizer.py --input MODEL_DIR --output TOKENIZER_DIR

python tools/convert_tokenizer.py --input MODEL_DIR/tokenizer.model.v3 --output TOKENIZER_DIR --sample documents.jsonl

python tools/convert_tokenizer.py --input a.tiktoken --special-tokens "<s>" "</s>" --eos-token "</s>" --output DIR
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.indexing.options import ConvertTokenizerOptions


def main() -> None:
    options = parse(ConvertTokenizerOptions, description=__doc__)
    from megatron_tpt.indexing.convert_tokenizer import convert_tokenizer

    convert_tokenizer(options)


command = program(main)

if __name__ == "__main__":
    command()
