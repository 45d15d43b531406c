"""Train a byte-level BPE tokenizer on documents and save it as a Hugging Face folder.

Every text can be encoded (there are tokens for all 256 bytes) and decoding gives the text back exactly. The
same input makes the same tokenizer.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory
from megatron_tpt.indexing.chat_template import read_template_file
from megatron_tpt.indexing.options import TrainTokenizerOptions
from megatron_tpt.indexing.tokenizer import CONFIG
from megatron_tpt.jobs.settings import require_absent, require_apart
from megatron_tpt.json_data import pretty
from megatron_tpt.logs import print_result
from megatron_tpt.records import expand_sources, read_records
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

logger = logging.getLogger(__name__)

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(options: TrainTokenizerOptions) -> Path:
    """Train a tokenizer and save it as `options.output`. Raises UserError for bad input or a folder that
    exists.
    """
    special = list(dict.fromkeys([EOS, PAD, OPEN_TAG, CLOSE_TAG, *options.special_tokens]))
    require_absent(options.output)
    require_apart(
        options.output, options.input, [source.path for source in expand_sources(options.input) if source.path]
    )
    smallest = 256 + len(special)
    if options.vocab_size < smallest:
        raise UserError(f"--vocab-size {options.vocab_size} is too small: bytes and special tokens take {smallest}")
    template = read_template_file(options.chat_template) if options.chat_template else None
    backend = _train(options, special)
    with atomic_directory(options.output) as folder:
        _save(folder, backend, template, options)
    print_result(f"{options.output}: {(num_tokens := backend.get_vocab_size()):,} tokens")
    if num_tokens < options.vocab_size:
        logger.warning(
            f"fewer than --vocab-size {options.vocab_size}, as these texts hold no more pairs to merge; "
            "train on more text for a larger vocabulary"
        )
    return options.output


def _train(options: TrainTokenizerOptions, special: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(options.split_digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    num_texts = 0

    def texts() -> Iterator[str]:
        nonlocal num_texts
        for record in read_records(options.input, text_column=options.text_column, advice="fix the line"):
            num_texts += 1
            yield record.text

    backend.train_from_iterator(texts(), trainer)
    if not num_texts:
        raise UserError("the input holds no document to train on")
    return backend


def _pre_tokenizer(split_digits: bool) -> pre_tokenizers.PreTokenizer:
    """Words of GPT-2, or of Qwen 2, where every digit is one of its own: both are known to fast tokenizers."""
    if not split_digits:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _save(folder: Path, backend: tokenizers.Tokenizer, template: str | None, options: TrainTokenizerOptions) -> None:
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        # As in the families that think, the tags are not "special" tokens: those are omitted from decoded text, and
        # with them every sign of where the thinking ends.
        token["special"] = token["content"] not in (OPEN_TAG, CLOSE_TAG)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": options.special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    if template is not None:
        config["chat_template"] = template
    for name, content in (("tokenizer.json", description), (CONFIG, config)):
        (folder / name).write_bytes(pretty(content, indent=1))
