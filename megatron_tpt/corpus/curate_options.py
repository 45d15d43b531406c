"""The options of `tools/curate.py`. Light to import: the help of the command line needs nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_tpt.config.fields import PositiveFloat, PositiveInt
from megatron_tpt.corpus.options import PrepareOptions, split_location
from megatron_tpt.errors import UserError
from megatron_tpt.generation import Api, EngineKind, EngineOptions

AnnotatorName = Literal["lengths", "domain", "reasoning", "language", "quality"]
FIELDS_OF: dict[AnnotatorName, tuple[str, ...]] = {
    "lengths": ("tokens", "answer_tokens", "thinking_tokens"),
    "domain": ("domain",),
    "reasoning": ("reasoning_intensity",),
    "language": ("language",),
    "quality": ("gopher_quality", "gopher_repetition", "fineweb_quality"),
}
"""The fields of `meta` that each annotator writes."""
IN_SCAN: frozenset[AnnotatorName] = frozenset(["lengths", "domain", "reasoning"])
"""Annotators that take about as little time as reading a document once more."""
_OF_INPUT = ("source", "tools", "system", "chat_template_kwargs")
_OF_JOB = (*_OF_INPUT, "datasets", "strata", "messages", "answer_begin")
"""Those that every job writes, and which of them are those of the input where it has them."""
_MAX_DATASETS = 64
_NAME = re.compile(r"[A-Za-z_]\w*")


class Dataset(NamedTuple):
    """One `--input NAME=FILE[:COLUMN[,COLUMN]]`."""

    name: str
    location: str
    columns: tuple[str, ...] | None
    """None: what --text-column says."""

    @property
    def has_thoughts(self) -> bool:
        """Whether the last column is THOUGHTS+ANSWER."""
        return self.columns is not None and len(self.columns) > 1 and self.columns[-1].count("+") == 1

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """The same, with the thoughts as a column before that of the answer."""
        if not self.has_thoughts:
            return self.columns
        assert self.columns is not None
        return (*self.columns[:-1], *self.columns[-1].split("+"))


class Named(NamedTuple):
    """A classifier or a judge: the field of `meta` that it writes, and where it is."""

    name: str
    path: Path


@dataclass(frozen=True)
class CurateOptions(PrepareOptions):
    """Which data sets to curate, what to find of their documents, and which strata to make of them."""

    input: list[str]
    """Data sets, NAME=FILE[:COLUMN[,COLUMN]], such as ldq=nemotron/:question,answer shq=thoughts/*.parquet:messages.
    FILE is a file, folder, pattern or data set of the Hub. Of several columns the last is the answer, THOUGHTS+ANSWER
    where another column has its thoughts; a column may hold a conversation; without a column it is --text-column. Their
    order decides which of several duplicates is the first.
    """
    output: Path
    """The folder to fill: part-*.jsonl.zst with the annotated documents, rejects/ with all others, report.md,
    report.json.
    """
    ignore_fields: list[str] = field(default_factory=list)
    """Fields of the messages of conversations that may be ignored; others that are not understood make a record bad."""
    annotate: list[AnnotatorName] = field(default_factory=lambda: ["lengths", "domain"])
    """Fields of `meta` to write. lengths: tokens, answer_tokens, thinking_tokens (needs --tokenizer). domain: math,
    code, science or general. reasoning: reasoning_intensity. language. quality: gopher_quality, gopher_repetition,
    fineweb_quality, "pass" or the reason. No value (--annotate) for none of them.
    """
    tokenizer: Path | None = None
    """The Hugging Face tokenizer folder by which lengths are counted."""
    classify: list[str] = field(default_factory=list)
    """Classifiers, NAME=MODEL: a fastText file (.bin, .ftz) or the folder of a Hugging Face sequence classifier. NAME
    becomes the label (of a regression the value), NAME_score its probability."""
    judge: list[str] = field(default_factory=list)
    """Prompts for a language model (--model), NAME=FILE: a YAML file with prompt and labels, or minimum and maximum; or
    one of the package, domain or reasoning. NAME becomes what it answers."""
    strata: str | None = None
    """A YAML file of strata, or front_loading for those of arXiv 2510.03264; they are written to meta.strata."""
    seed: int = 0
    """Which documents a stratum with a size takes."""
    budget: PositiveFloat | None = None
    """Training tokens to be drawn from a stratum, such as 80e9: the report says how often each would be repeated."""
    model: str | None = None
    """The language model for --judge: a Hugging Face folder, or its name at the endpoints."""
    engine: EngineKind = "vllm"
    """vllm: in this process. vllm-server: servers that this job starts. endpoint: servers that run already.
    transformers: where vLLM cannot be installed.
    """
    endpoints: list[str] = field(default_factory=list)
    """URLs of OpenAI-compatible servers for the engine endpoint, as in http://host:8000/v1."""
    api: Api = "completions"
    """What to ask of endpoints: completions of the plain prompt, or chat."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens; by default what the model was made for."""
    tensor_parallel_size: PositiveInt = 1
    """Devices that share the language model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.datasets()
        if "lengths" in self.annotate:
            self.require_tokenizer()
        elif self.tokenizer is not None:
            raise UserError("--tokenizer has no effect without --annotate lengths: give both, or neither")
        self.classifiers()
        if bool(self.judges()) != (self.model is not None):
            raise UserError("--judge and --model need each other: give both, or neither")
        if self.model is not None:
            self.engine_options()
        self._check_fields()

    def _check_fields(self) -> None:
        """Raise UserError where one field of `meta` would be written twice."""
        written: list[tuple[str, Sequence[str]]] = [
            ("--meta-columns", [name for name in self.meta_columns if name not in _OF_INPUT]),
            *((f"--annotate {name}", FIELDS_OF[name]) for name in dict.fromkeys(self.annotate)),
            *((f"--classify {one.name}={one.path}", (one.name, f"{one.name}_score")) for one in self.classifiers()),
            *((f"--judge {one.name}={one.path}", (one.name,)) for one in self.judges()),
        ]
        first = dict.fromkeys(_OF_JOB, "every job")
        for option, names in written:
            for name in names:
                if (other := first.setdefault(name, option)) != option:
                    raise UserError(f"{option} and {other} both write the field {name}: omit or rename one")

    def needs(self) -> list[tuple[str, bool, Sequence[str]]]:
        """See `PrepareOptions.needs`."""
        of_engine = ("engine", "endpoints", "api", "max_model_len", "tensor_parallel_size")
        return [
            *super().needs(),
            ("--judge", bool(self.judge), of_engine),
            ("--strata", self.strata is not None, ("seed",)),
            ("an --input without columns", any(one.columns is None for one in self.datasets()), ("text_column",)),
        ]

    def datasets(self) -> list[Dataset]:
        """What `input` names. Raises UserError for a form it cannot have."""
        found: list[Dataset] = []
        for text in self.input:
            name, equals, rest = text.partition("=")
            if not (equals and rest and _NAME.fullmatch(name)):
                raise UserError(f"--input {text}: give NAME=FILE or NAME=FILE:COLUMN, NAME of letters, digits and _")
            dataset = Dataset(name, *split_location(rest))
            if dataset.location in ("", "hf://") or not all(dataset.column_names or ("text",)):
                raise UserError(f"--input {text}: a name is missing; give NAME=FILE:COLUMN,COLUMN")
            found.append(dataset)
        if not found:
            raise UserError("--input names no data set: give NAME=FILE")
        if len({one.name for one in found}) > _MAX_DATASETS:
            raise UserError(f"--input names more than {_MAX_DATASETS} data sets: give several files one name")
        return found

    def locations(self) -> list[str]:
        """The files, folders, patterns and data sets of the input."""
        return [one.location for one in self.datasets()]

    def require_tokenizer(self) -> Path:
        """The tokenizer for lengths. Raises UserError where none is given."""
        if self.tokenizer is None:
            raise UserError("--annotate lengths needs --tokenizer; or name other annotators, such as --annotate domain")
        return self.tokenizer

    @property
    def annotates_in_scan(self) -> bool:
        """Whether documents are annotated when they are first read, before duplicates among them are known."""
        return IN_SCAN.issuperset(self.annotate) and not self.classify

    def classifiers(self) -> list[Named]:
        """What `classify` names."""
        return [_named("--classify", text) for text in self.classify]

    def judges(self) -> list[Named]:
        """What `judge` names."""
        return [_named("--judge", text) for text in self.judge]

    def engine_options(self) -> EngineOptions:
        """The engine for the judges."""
        return EngineOptions(
            model=self.model or "",
            max_model_len=self.max_model_len,
            tensor_parallel_size=self.tensor_parallel_size,
            kind=self.engine,
            endpoints=tuple(self.endpoints),
            api=self.api,
        )


def _named(option: str, text: str) -> Named:
    name, equals, rest = text.partition("=")
    if not (equals and rest and _NAME.fullmatch(name)):
        raise UserError(f"{option} {text}: give NAME=FILE, NAME of letters, digits and _")
    return Named(name, Path(rest).expanduser())
