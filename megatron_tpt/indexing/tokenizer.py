"""A Hugging Face tokenizer folder, used the way training data needs it.

Raw text is only text: special tokens and think tags that happen to occur in it are spelt out, never turned
into the token of that name, and no begin- or end-of-sequence token is added. Where such a token belongs, we
put it ourselves.
"""

import itertools
import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import tokenizers

from megatron_tpt.errors import Fault, UserError, failure, one_line
from megatron_tpt.files import file_checksum
from megatron_tpt.json_data import pretty, read_json, read_object
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG

CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
EOS_FILES = (CONFIG, "special_tokens_map.json")
"""The settings that may name the end-of-sequence token."""
_SETTINGS = (*EOS_FILES, "added_tokens.json")
_KINDS_OF_TOKENS = ("bos", "eos", "pad", "unk")
_MODEL_FILES = ("generation_config.json", "config.json")

Tokens = numpy.ndarray[tuple[int], numpy.dtype[numpy.int32]]


class Spelling(NamedTuple):
    """The tokens of a tag that is no token, and how the same text can be made of others."""

    ids: list[int]
    place: int
    """Which of `ids` becomes two."""
    parts: tuple[int, int] | None
    """The two; none where there is no other way."""


def tokenizer_fingerprint(folder: str | Path) -> str:
    """ "sha256:" and the digest of `tokenizer.json`. Raises UserError when the folder has none."""
    return file_checksum(_tokenizer_file(Path(folder)))


class Tokenizer:
    """The tokenizer of a folder with `tokenizer.json` and `tokenizer_config.json`.

    Raises UserError when the folder has no readable tokenizer, or when no end-of-sequence token is named
    there: without one, documents would run into each other. With `parse_special_tokens`, special tokens that occur in
    a text do become the tokens of that name.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    """The largest token id + 1."""
    eos_id: int
    open_ids: list[int]
    """The token of "<think>", or the tokens of the tag encoded on its own where it is no token."""
    close_ids: list[int]
    """The same for "</think>"."""
    special_tokens: list[str]
    """The names of tokens that are not text; the think tags are among them."""
    is_special: numpy.ndarray[tuple[int], numpy.dtype[numpy.bool_]]
    """Whether raw text must not make a token, [vocab_size]."""

    def __init__(self, folder: str | Path, *, parse_special_tokens: bool = False) -> None:
        self.folder = Path(folder)
        self.parse_special_tokens = parse_special_tokens
        self.fingerprint = tokenizer_fingerprint(self.folder)
        check_settings(self.folder)
        self._backend, self.special_tokens = _load(_tokenizer_file(self.folder))
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = _find_eos(self.folder, self._backend)
        self.is_special = numpy.zeros(self.vocab_size, dtype=bool)
        self.open_ids = self._tag_ids(OPEN_TAG)
        self.close_ids = self._tag_ids(CLOSE_TAG)
        self._backend.encode_special_tokens = not parse_special_tokens
        if not parse_special_tokens:
            ids = [id for name in self.special_tokens if (id := self._backend.token_to_id(name)) is not None]
            self.is_special[ids] = True
        special = numpy.flatnonzero(self.is_special)
        self._special_range = (int(special[0]), int(special[-1])) if len(special) else (1, 0)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of every text, as raw text."""
        encoded = self._encode_batch(texts)
        for i, tokens in enumerate(encoded):
            # Models whose vocabulary is looked up by whole words can still find a special token.
            if self.is_special[tokens].any():
                encoded[i] = self._encode_spelt_out(texts[i])
        return encoded

    def _encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # bare Exception, for instance without a token for the unknown
            raise UserError(
                f"{self.folder}: this tokenizer cannot encode a text of the input ({one_line(error)})"
            ) from error
        return [numpy.asarray(encoding.ids, dtype=numpy.int32) for encoding in encodings]

    def find_special(self, tokens: numpy.ndarray) -> numpy.ndarray:
        """Where in tokens [n], of an integer type, special ones are: their places, in order."""
        first, last = self._special_range
        # Mostly they are together at one end of the vocabulary: nearly all tokens are outside.
        places = numpy.flatnonzero((tokens >= first) & (tokens <= last))
        return places[self.is_special[tokens[places]]]

    def encode(self, text: str) -> list[int]:
        """The tokens of one raw text."""
        return self.encode_batch([text])[0].tolist()

    def encode_tagged(self, text: str) -> list[int]:
        """The tokens of a text of our own, in which the think tags do mean the tags (SFT responses)."""
        pieces = re.split(f"({OPEN_TAG}|{CLOSE_TAG})", text)
        tags = {OPEN_TAG: self.open_ids, CLOSE_TAG: self.close_ids}
        return [id for piece in pieces if piece for id in (tags.get(piece) or self.encode(piece))]

    def decode(self, tokens: Sequence[int] | Tokens) -> str:
        """The text of `tokens`; special tokens are shown."""
        return self._backend.decode(list(map(int, tokens)), skip_special_tokens=False)

    def _tag_ids(self, tag: str) -> list[int]:
        token = self._backend.token_to_id(tag)
        ids = self._backend.encode(tag, add_special_tokens=False).ids if token is None else [token]
        if not ids:
            raise UserError(f"{self.folder}: this tokenizer cannot encode {tag!r}; add it as a special token")
        return ids

    def named_id(self, kind: str) -> int | None:
        """The id of the token that the folder's settings name, `kind` is "bos" or "pad"; None where they name none."""
        names = (_named_token(self.folder / name, kind) for name in EOS_FILES)
        name = next(filter(None, names), None)
        return None if name is None else self._backend.token_to_id(name)

    def tag_spellings(self) -> list[Spelling]:
        """Those of the think tags that raw text can make: none with think tokens, nor where it is to make them."""
        tags = {OPEN_TAG: self.open_ids, CLOSE_TAG: self.close_ids}
        if self.parse_special_tokens:
            return []
        return [self._spelling(ids) for tag, ids in tags.items() if self._backend.token_to_id(tag) is None]

    def _spelling(self, ids: list[int]) -> Spelling:
        text = self.decode(3 * ids)
        for place, id in enumerate(ids):
            name = self._backend.id_to_token(id) or ""
            for cut in range(1, len(name)):
                first, second = map(self._backend.token_to_id, (name[:cut], name[cut:]))
                if first is None or second is None or self.is_special[[first, second]].any():
                    continue
                if self.decode([*ids, *ids[:place], first, second, *ids[place + 1 :], *ids]) == text:
                    return Spelling(ids, place, (first, second))
        return Spelling(ids, 0, None)

    def _encode_spelt_out(self, text: str) -> Tokens:
        """Encode `text` with every special token's name in it cut after its first character."""
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return numpy.concatenate(self._encode_batch(pieces))


def find_originals(folder: Path) -> list[Path]:
    """The files in a folder that tools/convert_tokenizer.py makes a tokenizer of, in the order in which Mistral's own
    library would choose: tekken.json, then SentencePiece models (tokenizer.model.v7, ..., tokenizer.model)."""
    files = sorted((file for file in folder.iterdir() if file.is_file()), reverse=True)
    patterns = (r"tekken.*\.json", r".*\.model\.v\d+(m\d+)?", r".*\.model", r".*\.tiktoken")
    return [file for pattern in patterns for file in files if re.fullmatch(pattern, file.name)]


def _tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if folder.is_file():
        raise UserError(f"{folder}: a file; give the folder of the tokenizer, with tokenizer.json in it")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder")
    if not path.is_file():
        for file in find_originals(folder):
            raise UserError(
                f"{folder}: no tokenizer.json, but {file.name}; convert it: "
                f"tools/convert_tokenizer.py --input {file} --output FOLDER"
            )
        raise UserError(
            f"{folder}: no tokenizer.json; make one: AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained(FOLDER)"
        )
    return path


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder's tokenizer.json holds. Raises UserError when it is missing or damaged."""
    return read_object(_tokenizer_file(folder))


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokens of a folder's tokenizer.json. Raises UserError when it is missing or damaged."""
    return _load(_tokenizer_file(folder))[0]


def _load(path: Path) -> tuple[tokenizers.Tokenizer, list[str]]:
    """The backend, set to leave special tokens in text alone, and the names of these special tokens."""
    try:
        description = read_json(path)
        added = description.get("added_tokens") or []
        for token in added:
            # Some families keep their think tags as ordinary added tokens; raw text must not make them.
            token["special"] = token["special"] or token["content"] in (OPEN_TAG, CLOSE_TAG)
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises bare Exception for what it cannot read
        raise UserError(f"{path}: not a readable tokenizer ({one_line(error)})") from error
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    special = [token["content"] for token in added if token["special"]]
    return backend, list(dict.fromkeys([*special, OPEN_TAG, CLOSE_TAG]))


def _find_eos(folder: Path, backend: tokenizers.Tokenizer) -> int:
    """The id of the end-of-sequence token that the folder's configuration names."""
    for name in EOS_FILES:
        if token := _named_token(folder / name, "eos"):
            if (id := backend.token_to_id(token)) is None:
                raise UserError(
                    f"{folder / name}: eos_token {reprlib.repr(token)} is not in the tokenizer's vocabulary"
                )
            return id
    for name in _MODEL_FILES:
        id = read_object(folder / name).get("eos_token_id")
        if isinstance(id, list):
            id = id[0] if id else None
        if id is not None:
            if not isinstance(id, int) or not 0 <= id < 1 << 32 or backend.id_to_token(id) is None:
                raise UserError(
                    f"{folder / name}: eos_token_id {reprlib.repr(id)} is not in the tokenizer's vocabulary"
                )
            return id
    raise UserError(
        f"{folder}: this tokenizer names no end-of-sequence token, so documents could not be separated; "
        'set "eos_token" in tokenizer_config.json'
    )


def _named_token(path: Path, kind: str, content: dict[str, Any] | None = None) -> str | None:
    """The token that a file, with this content, names as `kind`_token. Raises UserError for what is no name."""
    token = (read_object(path) if content is None else content).get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise UserError(f"{path}: {kind}_token is {reprlib.repr(token)}, not the name of a token; correct it")
    return token


def check_settings(folder: Path) -> None:
    """Raise UserError for a file next to tokenizer.json that is damaged, if that shows without using it."""
    for path in (folder / name for name in _SETTINGS):
        content = read_object(path)
        for kind in _KINDS_OF_TOKENS:
            _named_token(path, kind, content)
        if not isinstance(template := content.get("chat_template"), str | list | dict | None):
            raise UserError(f"{path}: chat_template is {reprlib.repr(template)}, not a text; restore it")


def loading_failure(folder: Path, error: Exception) -> UserError | Fault:
    """What to raise where transformers could not load the tokenizer of a folder that `check_settings` had passed."""
    if (path := folder / "tokenizer.json").is_file():
        try:
            _load(path)
        except UserError as damage:
            return damage
    names = [name for name in (*_SETTINGS, *_MODEL_FILES) if (folder / name).is_file()]
    advice = f"; restore the one of these that is damaged: {', '.join(names)}" if names else ""
    if not path.is_file() and not (folder / "config.json").is_file():
        advice = "; without tokenizer.json, transformers finds its class by config.json: copy either into the folder"
    return failure(f"{folder}: its tokenizer cannot be loaded ({one_line(error)}){advice}", error)


# The other files of a model folder are weights and settings of the model.
TOKENIZER_FILES = (
    "tokenizer.json",
    *_SETTINGS,
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
)


def is_of_other_tokenizer(checkpoint: Path, fingerprint: str) -> bool:
    """Whether a checkpoint keeps a tokenizer and it is not the one of this fingerprint."""
    folder = checkpoint / "tokenizer"
    return (folder / "tokenizer.json").is_file() and tokenizer_fingerprint(folder) != fingerprint


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of a folder, and nothing else that is there, by name. Raises UserError when tokenizer.json is
    not among them.

    Where only the model's files name the end-of-sequence token (config.json, generation_config.json), which do not
    come along, tokenizer_config.json gains it.
    """
    _tokenizer_file(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    named_by_tokenizer = any(read_object(folder / name).get("eos_token") for name in EOS_FILES)
    named_by_model = any(read_object(folder / name).get("eos_token_id") is not None for name in _MODEL_FILES)
    if named_by_model and not named_by_tokenizer:
        backend, _ = _load(folder / "tokenizer.json")
        eos_token = backend.id_to_token(_find_eos(folder, backend))
        files[CONFIG] = pretty(read_object(folder / CONFIG) | {"eos_token": eos_token}, indent=1)
    return files


def copy_tokenizer(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy the tokenizer files of `source` into `target`, made when it is missing. Raises UserError when `source` has
    no tokenizer.json.

    With `chat_template`, that is the only template of the copy, in CHAT_TEMPLATE: tokenizer_config.json then
    holds no other, for not every program reads the two in the same order.
    """
    files = read_tokenizer_files(source)
    if chat_template is not None:
        files[CHAT_TEMPLATE] = chat_template.encode()
        config = read_object(source / CONFIG) if CONFIG in files else {}
        if config.get("chat_template", chat_template) != chat_template:
            del config["chat_template"]
            files[CONFIG] = pretty(config, indent=1)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
