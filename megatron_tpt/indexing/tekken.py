"""tekken.json, the format of Mistral's tokenizers since 2024: tiktoken's ranks after a block of special tokens."""

import base64
from pathlib import Path
from typing import NamedTuple, Self

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_tpt.errors import UserError
from megatron_tpt.json_data import read_json

EOS = "</s>"
# Files of the versions up to v7 do not list them.
_FIRST_SPECIAL = (
    "<unk>", "<s>", EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


class Tekken(NamedTuple):
    """What a tekken.json holds. The id of a token of text is its rank plus the number of special tokens."""

    pattern: str
    """By which text is split into words."""
    ranks: dict[bytes, int]
    special: list[str]
    """The names of the special tokens, by id. Text never makes one, whether or not it is a control token."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UserError for another file."""
        try:
            content = read_json(path)
            config = content["config"]
            num_special, num_tokens = config["default_num_special_tokens"], config["default_vocab_size"]
            ranks = {
                base64.b64decode(token["token_bytes"], validate=True): token["rank"]
                for token in content["vocab"]
                if token["rank"] < num_tokens - num_special
            }
            names = dict(enumerate(_FIRST_SPECIAL))
            if (listed := content.get("special_tokens")) is not None:
                names = {token["rank"]: token["token_str"] for token in listed}
            special = [names.get(id, f"<SPECIAL_{id}>") for id in range(num_special)]
            tekken = cls(config["pattern"], ranks, special)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable as a tekken.json of Mistral ({error!r})") from None
        if sorted(ranks.values()) != list(range(num_tokens - num_special)) or len(set(special)) != num_special:
            raise UserError(f"{path}: not readable as a tekken.json of Mistral (its ranks or names are not whole)")
        return tekken

    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer as Hugging Face tokenizers have it."""
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter()
        converter.load_tiktoken_bpe = lambda _: self.ranks  # type: ignore[method-assign]
        vocabulary, merges = converter.extract_vocab_merges_from_model("")
        ids = {name: id for id, name in enumerate(self.special)}
        ids |= {name: rank + len(self.special) for name, rank in vocabulary.items()}
        backend = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=True))
        words = pre_tokenizers.Split(tokenizers.Regex(self.pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in self.special])
        return backend
