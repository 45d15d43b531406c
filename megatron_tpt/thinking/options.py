"""The options of `tools/augment.py`. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_tpt.config.fields import FLAT, REPEATED, NonNegativeInt, PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.errors import UserError
from megatron_tpt.generation import Api, DType, EngineKind, EngineOptions, Sampling, Temperature, TopP
from megatron_tpt.generation.request_fields import (
    CHAT_TEMPLATE_KWARGS,
    LengthField,
    OmittableField,
    parse_request_fields,
)
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.records import OnBadRecord
from megatron_tpt.think_tags import CLOSE_TAG, OPEN_TAG
from megatron_tpt.thinking.filter_options import FilterOptions

ThinkingBlock = Literal["auto", "open", "none"]
Truncated = Literal["keep", "drop", "sentence"]

# Options that would be ignored with other engines. None of them is among the job's settings.
_ENGINES_OF: dict[str, tuple[EngineKind, ...]] = {
    "length_field": ("endpoint",),
    "omit_fields": ("endpoint",),
    "api_key_env": ("endpoint",),
    "request_timeout_s": ("endpoint", "vllm-server"),
    "hang_timeout_s": ("vllm-server",),
    "num_engines": ("vllm-server",),
    "tensor_parallel_size": ("vllm", "vllm-server"),
}


@dataclass(frozen=True)
class AugmentOptions:
    """Which documents to think about, which model does it, and how."""

    input: list[str]
    """Files (.jsonl, .ndjson, .json, each plain or as .gz, .zst, .bz2, .xz; .parquet; .arrow), folders of them,
    patterns ("data/*.parquet"), Hugging Face data sets (a local folder, or hf://owner/name).
    """
    output: Path
    """The folder to fill with part-*.jsonl.zst, rejects/, a data set card. What is there already is not repeated."""
    model: str
    """The model that thinks: a Hugging Face model folder, a Hub id (owner/name), or its name at the endpoints."""
    text_column: str = "text"
    """The column with the document; several, as in "question,answer", are joined by a newline."""
    id_column: str = "id"
    """The column with the record's id; without a column "id" the id is made from the content."""
    meta_columns: list[str] = field(default_factory=list)
    """Other columns to keep in the record's `meta`, for tools/analyze_thinking.py and for you."""
    on_bad_record: OnBadRecord = "stop"
    """Stop at a record without usable text, or put it among the rejects. It may change while a job is unfinished."""
    limit: PositiveInt | None = None
    """Read only the first N rows of the input."""

    prompt: str = "expert"
    """expert, random-focus, back-thinking (needs the columns question and answer), rephrase, or a file of yours with
    {document}, {focused_document} or {COLUMN} where the text goes.
    """
    max_document_tokens: PositiveInt = 2048
    """The model sees this much of a document at once, in its own tokens."""
    long_documents: Literal["truncate", "chunk"] = "truncate"
    """Longer documents: the model sees their beginning, or all of them in chunks with a thinking each."""
    text: Literal["full", "truncated"] = "full"
    """What the record keeps of a longer document that was truncated: all, or what the model has seen."""
    thinking_block: ThinkingBlock = "auto"
    """Open the model's thinking block and stop at its end; auto: where its tokenizer or chat template knows one. Of
    other models the plain answer is the thinking.
    """
    open_tag: str = OPEN_TAG
    """What begins the model's thinking."""
    close_tag: str = CLOSE_TAG
    """What ends the model's thinking."""

    max_new_tokens: PositiveInt = 8192
    """Longest thinking, in tokens; longer ones are truncated."""
    temperature: Temperature = 0.6
    """Randomness of the thinking; 0 takes the likeliest token."""
    top_p: TopP = 0.9
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Every request gets its own seed from this one and the record's id."""
    rollouts: PositiveInt = 1
    """Thoughts per document, each in a record of its own: with 2 or more the ids end in #0, #1, ..."""
    truncated: Truncated = "keep"
    """Thoughts truncated at `max_new_tokens`: keep them, reject them, or cut them back to the last whole sentence.
    `meta.truncated` says which they are.
    """
    filters: FilterOptions = field(default_factory=FilterOptions)
    """Which thoughts to reject."""

    rows_per_shard: PositiveInt = 1000
    """Rows of the input per output file."""
    estimate: PositiveInt | None = None
    """Write nothing: think about this many documents drawn from the input, and report what all of them would cost."""

    status: bool = False
    """Report the progress of the job in the output folder, and do nothing: on any machine that sees the folder."""
    retry_rejects: list[str] = field(default_factory=list)
    """Retry documents that were rejected for these reasons, as in engine_timeout loop, "engine_*", or all."""
    refilter: bool = False
    """Apply other --filters to all that was generated, without generating again; rejects may become records and records
    rejects."""

    engine: EngineKind = "vllm"
    """vllm: in this process. vllm-server: servers that this job starts and watches, one per GPU (or group of
    `tensor_parallel_size`). endpoint: OpenAI-compatible servers by URL. transformers: where vLLM cannot be installed.
    """
    endpoints: list[str] = field(default_factory=list)
    """URLs of OpenAI-compatible servers, as in http://host:8000/v1."""
    api: Api = "completions"
    """What to ask of endpoints: completions of whole prompts, or chat, where the server applies the chat template."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the key for the endpoints."""
    request_field: Annotated[list[list[str]], REPEATED] = field(default_factory=list)
    """A field NAME=VALUE for endpoints, sent with every request, as in top_k=20; values are JSON where they can be. It
    can be given several times. Every engine takes chat_template_kwargs={"NAME": VALUE}.
    """
    length_field: LengthField = "max_tokens"
    """The request field in which endpoints get --max-new-tokens."""
    omit_fields: Annotated[list[list[OmittableField]], REPEATED] = field(default_factory=list)
    """Fields not to send to endpoints, as some models refuse them; then the server's own values hold."""
    request_timeout_s: PositiveFloat = 3600
    """Longest wait for one answer of a server."""
    hang_timeout_s: PositiveFloat = 600
    """vllm-server: a server that has requests, and has written no token for this long, is ended and restarted."""
    tokenizer: str | None = None
    """The model's tokenizer (a folder or Hub id) where `model` is only a name at an endpoint. With --api chat it may
    be omitted; then four characters count as a token.
    """
    dtype: DType = "auto"
    """Number format of the model; "auto" is what its config.json says, or float32 on a CPU without instructions for
    that."""
    tensor_parallel_size: PositiveInt = 1
    """Number of devices that share the model."""
    num_engines: PositiveInt | None = None
    """Servers that vllm-server starts; by default as many as the GPUs allow."""
    max_num_seqs: PositiveInt | None = None
    """Most documents thought about at once by one engine; by default the engine's own choice, 256 on CPUs."""

    task: NonNegativeInt | None = None
    """Do only this part of the job, from 0 to --num-tasks - 1; set by the executors."""
    scale: Annotated[ScaleOptions, FLAT] = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.engine == "endpoint") != bool(self.endpoints):
            raise UserError("--engine endpoint and --endpoints URL... need each other")
        if self.api == "chat" and self.engine != "endpoint":
            raise UserError("--api chat is for --engine endpoint; the other engines apply the chat template themselves")
        if self.task is not None and self.task >= self.scale.num_tasks:
            raise UserError(f"--task {self.task}: must be from 0 to --num-tasks - 1 ({self.scale.num_tasks - 1})")
        if self.limit is not None and self.scale.num_tasks > 1:
            raise UserError("--limit counts the rows of the whole input, which tasks cannot; omit one of them")
        if self.text == "truncated" and self.long_documents == "chunk":
            raise UserError("--text truncated needs --long-documents truncate; chunks cover the whole document")
        self._check_mode()
        self._check_engine()

    def _check_mode(self) -> None:
        modes = {
            "--status": self.status,
            "--estimate": self.estimate is not None,
            "--retry-rejects": bool(self.retry_rejects),
            "--refilter": self.refilter,
        }
        given = [name for name, is_given in modes.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} do different things; give one of them at a time")

    def _check_engine(self) -> None:
        for name, engines in _ENGINES_OF.items():
            if self.engine not in engines and getattr(self, name) != _default(name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --engine {self.engine}, "
                    f"only with {' or '.join(engines)}; omit it"
                )
        for name in self.request_fields():
            if name != CHAT_TEMPLATE_KWARGS and self.engine != "endpoint":
                raise UserError(
                    f"--request-field {name} has no effect with --engine {self.engine}, which takes no field but "
                    f"{CHAT_TEMPLATE_KWARGS}; omit it"
                )
        for name in ("temperature", "top_p"):
            if name in self.omitted() and getattr(self, name) != _default(name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with --omit-fields {name}; give one of them")

    def notes(self) -> list[str]:
        """What was given and has no effect, of the options that a job begun with them cannot drop again."""
        notes = []
        if self.engine == "endpoint" and self.dtype != "auto":
            notes.append(f"--dtype {self.dtype} has no effect with --engine endpoint: the server chooses")
        if self.api == "chat" and self.thinking_block == "open":
            notes.append(
                "--thinking-block open has no effect with --api chat: the server's chat template decides; see "
                f"--request-field {CHAT_TEMPLATE_KWARGS}=..."
            )
        if self.temperature == 0 and self.top_p != _default("top_p"):
            notes.append(f"--top-p {self.top_p} has no effect with --temperature 0")
        if self.temperature == 0 and self.rollouts > 1:
            notes.append(f"--rollouts {self.rollouts} with --temperature 0 gives the same thought again and again")
        if (self.estimate is not None or self.refilter) and self.scale.is_split:
            mode = "--refilter" if self.refilter else "--estimate"
            notes.append(f"--executor and --num-tasks have no effect with {mode}, which is one process on this machine")
        return notes

    def request_fields(self) -> dict[str, Any]:
        """The fields in `request_field`."""
        return parse_request_fields(text for texts in self.request_field for text in texts)

    def chat_template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given where the prompt is made here, not by a chat server."""
        return {} if self.api == "chat" else self.request_fields().get(CHAT_TEMPLATE_KWARGS, {})

    def omitted(self) -> tuple[OmittableField, ...]:
        """The fields in `omit_fields`."""
        return tuple(dict.fromkeys(name for names in self.omit_fields for name in names))

    def sampling(self) -> Sampling:
        """The sampling these options ask for; what the prompt decides is left open."""
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, seed=self.seed)

    def text_columns(self) -> list[str]:
        """The names in `text_column`."""
        return [name.strip() for name in self.text_column.split(",")]

    def engine_options(self, max_model_len: int | None, log_dir: Path) -> EngineOptions:
        """The engine these options ask for, with a context of `max_model_len` tokens; None is the model's own."""
        fields = self.request_fields()
        if self.api != "chat":  # the template is applied here
            fields.pop(CHAT_TEMPLATE_KWARGS, None)
        return EngineOptions(
            kind=self.engine,
            model=self.model,
            max_model_len=max_model_len,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            max_num_seqs=self.max_num_seqs,
            num_engines=self.num_engines,
            endpoints=tuple(self.endpoints),
            api=self.api,
            api_key_env=self.api_key_env,
            request_fields=fields,
            length_field=self.length_field,
            omit_fields=self.omitted(),
            request_timeout_s=self.request_timeout_s,
            hang_timeout_s=self.hang_timeout_s,
            log_dir=log_dir,
        )


def _default(name: str) -> Any:
    field = next(field for field in fields(AugmentOptions) if field.name == name)
    return field.default_factory() if callable(field.default_factory) else field.default
