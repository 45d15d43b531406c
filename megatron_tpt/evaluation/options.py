"""The options of `tools/evaluate.py`. Light to import: the help of the command line needs nothing else."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_tpt.config import cli
from megatron_tpt.config.convert import Converter
from megatron_tpt.config.fields import FLAT, PositiveFloat, PositiveInt, hints_of
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.benchmark import SHOWN, Benchmark, files_of
from megatron_tpt.generation import DType, EarlyExit, EngineKind, EngineOptions, ExitCriterion
from megatron_tpt.jobs.options import ScaleOptions

_OF_NO_FIGURE = SHOWN | {"name", "fetch", "id_column", "seed", "limit", "allow_unsandboxed_code"}
"""Options of benchmarks that make a published figure no less comparable; of a limit, the report says so itself."""
_OF_DOCUMENTS = ("id_column", "document_window", "limit")
"""Options of benchmarks that also are those of --documents."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Benchmark):
    """Which models answer which problems, and how their answers are read."""

    model: list[str] = field(default_factory=list)
    """Hugging Face model folders or Hub ids; several are evaluated one after another. For the engine endpoint, the name
    under which the model is served."""
    output: Path
    """The folder for results.json, report.md, report.html and, in a folder per model and benchmark, samples.jsonl.zst.
    With --run, one such folder per checkpoint.
    """
    run: Path | None = None
    """Instead of models: the folder of a training run, whose checkpoints are exported and evaluated one after another.
    Their figures are shown beside those of training, in RUN/tensorboard/evaluation."""
    follow: bool = False
    """With --run, also evaluate the checkpoints to come, up to that of the last step."""
    benchmark: list[str] = field(default_factory=list)
    """Benchmarks and suites by their names, or YAML files of your own. Options that are given here win over theirs."""
    data_dir: Path | None = None
    """The folder with the files of the benchmarks; without it their data come from the Hub."""
    documents: str | Path | None = None
    """Texts whose perplexity is measured, one a row, wherever problems may be too: a benchmark of --scoring perplexity
    with the name "documents", alone or beside others.
    """
    text_column: str = "text"
    """The column of --documents with the text."""
    recurrences: str | None = None
    """Evaluate recurrent models at these numbers of iterations, such as 1,2,4,8,16,32, with a table and a plot over
    them; other models once, beside them. By default, what config.json says.
    """
    exit_criterion: ExitCriterion | None = None
    """Let generated tokens of recurrent models take fewer iterations: when the change of their state, the entropy of
    the next token's distribution, or the change of that (kl), is below a threshold. Needs --engine transformers.
    """
    exit_threshold: PositiveFloat | None = None
    """The threshold: of relative change (state), or in nats (entropy, kl)."""
    training_flops: list[PositiveFloat] = field(default_factory=list)
    """Training operations of each model, in the order of --model: the plot over --recurrences is also against them."""
    corpus: list[Path] = field(default_factory=list)
    """Training corpora, as folders of tools/prepare.py or tools/curate.py: the report says which problems they held,
    and the accuracy on the others."""
    rescore: bool = False
    """Grade the outputs that are in the output folder again, without a model, and show what changes."""
    engine: EngineKind = "vllm"
    """What runs the model: vLLM in this process, vLLM servers on all GPUs, servers that run already, or transformers.
    """
    tokenizer: str | None = None
    """The folder or Hub id of the tokenizer; by default the model's. The engine endpoint needs it."""
    endpoints: list[str] = field(default_factory=list)
    """Base URLs for the engine endpoint, as in http://host:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key for the endpoints."""
    num_engines: PositiveInt | None = None
    """Servers that vllm-server starts; by default as many as the GPUs have room for."""
    dtype: DType = "auto"
    """Number format of the model; "auto" is what its config.json says, or float32 on a CPU without instructions for
    that."""
    tensor_parallel_size: PositiveInt = 1
    """Number of devices that share the model."""
    max_num_seqs: PositiveInt | None = None
    """Most answers computed at once; by default 256 on CPUs and vLLM's own choice on GPUs."""
    scale: Annotated[ScaleOptions, FLAT] = field(default_factory=ScaleOptions)
    task: int | None = None
    """Do this task alone; set by --executor and --num-tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == (self.run is not None):
            raise UserError("give either --model or --run: which models answer")
        if self.run is not None and (self.rescore or self.scale.is_split or self.engine == "endpoint"):
            raise UserError(
                "--run evaluates checkpoints in this process: omit --rescore, --num-tasks, --executor and "
                "--engine endpoint"
            )
        if self.rescore and self.scale.is_split:
            raise UserError("--rescore grades in this process: omit --num-tasks and --executor")
        if self.task is not None and not 0 <= self.task < self.scale.num_tasks:
            raise UserError(f"--task {self.task}: there are {self.scale.num_tasks} (--num-tasks), from 0 on")
        if self.follow and self.run is None:
            raise UserError("--follow waits for the checkpoints of --run: give both")
        if not self.benchmark and self.data is None and self.data_file is None and self.documents is None:
            raise UserError("nothing to evaluate: name a --benchmark, or give --data with problems or --documents")
        if self.engine == "endpoint" and self.tokenizer is None:
            raise UserError("--engine endpoint needs --tokenizer: prompts are sent as its tokens, and counted")
        if self.documents is None and self.text_column != "text":
            raise UserError("--text-column is that of --documents: give both")
        has_documents = self.documents is not None or self.scoring == "perplexity" or self.benchmark
        if self.document_window is not None and not has_documents:
            raise UserError("--document-window is for --documents: give both")
        self._check_recurrences()
        depth = min(self.depths(), default=None)
        self.engine_options("model", None, depth, self.early_exit())  # refuses what does not fit together

    def _check_recurrences(self) -> None:
        if (self.exit_criterion is None) != (self.exit_threshold is None):
            raise UserError("early exit needs --exit-criterion and --exit-threshold: give both, or neither")
        if self.training_flops and (self.recurrences is None or len(self.training_flops) != len(self.model)):
            raise UserError("--training-flops: give one number for each --model, and --recurrences")

    def ignored(self) -> list[str]:
        """The options that were given and change nothing, for example since they are of another way to score."""
        is_written, is_compared = self.scoring == "generate", self.scoring == "log-likelihood"
        has_choices = bool(self.choices_column or self.choice_columns or self.choice_texts)
        has_shots, runs_code = bool(self.few_shot or self.few_shot_file), self.answer_type == "code"
        counts = {
            ("temperature", "max_new_tokens", "stop", "answer_pattern", "answer_position"): is_written,
            ("top_p",): is_written and self.temperature > 0,
            ("likelihood_of", "normalize_by"): is_compared,
            ("blank",): is_compared and self.likelihood_of == "rest",
            ("document_window",): self.scoring == "perplexity" or self.documents is not None,
            ("choice_labels", "labels_column", "choice_format", "choice_separator", "shuffle_choices"): has_choices,
            ("num_shots", "shot_template", "shot_group", "shot_begin"): has_shots,
            ("code_prefix_column", "code_time_limit_s", "allow_unsandboxed_code"): runs_code,
            ("answer_column",): not (self.answer_columns or self.answer_template) and self.scoring != "perplexity",
            ("data_dir",): self.data_file is not None or self.few_shot_file is not None,
            ("num_engines",): self.engine == "vllm-server",
            ("tensor_parallel_size",): self.engine in ("vllm", "vllm-server"),
            ("dtype",): self.engine != "endpoint",
            ("api_key_env",): self.engine == "endpoint",
        }
        unset = {each.name: _default(each) for each in fields(EvaluateOptions)}
        return [
            f"--{name.replace('_', '-')}"
            for group, is_used in counts.items()
            for name in group
            if not is_used and getattr(self, name) != unset[name]
        ]

    def depths(self) -> list[int]:
        """The numbers in --recurrences, ascending; none when it is not given."""
        if self.recurrences is None:
            return []
        try:
            depths = sorted({int(number) for number in self.recurrences.split(",")})
        except ValueError:
            depths = [0]
        if depths[0] < 1:
            raise UserError(
                f"--recurrences {self.recurrences}: give numbers from 1 on with commas between them, such as 1,2,4,8"
            )
        return depths

    def early_exit(self) -> EarlyExit | None:
        """When generated tokens stop to iterate."""
        if self.exit_criterion is None or self.exit_threshold is None:
            return None
        return EarlyExit(self.exit_criterion, self.exit_threshold)

    def engine_options(
        self,
        model: str,
        context: int | None,
        num_recurrences: int | None = None,
        early_exit: EarlyExit | None = None,
    ) -> EngineOptions:
        """The engine for `model`, with room for `context` tokens; of a recurrent model also its depth."""
        return EngineOptions(
            model,
            context,
            self.dtype,
            self.tensor_parallel_size,
            self.max_num_seqs,
            num_recurrences,
            early_exit,
            self.engine,
            self.num_engines,
            tuple(self.endpoints),
            api_key_env=self.api_key_env,
        )

    def with_documents(self) -> "list[EvaluateOptions]":
        """These options for the problems, if there are any, and for the documents."""
        has_problems = self.data is not None or self.data_file is not None or self.documents is None
        if not has_problems and (unused := self._options_of_problems()):
            raise UserError(f"{unused[0]} is for problems, and there are none beside --documents: omit it")
        return [*([self] if has_problems else []), *self.of_documents()]

    def _options_of_problems(self) -> list[str]:
        """The options that were given, and that say nothing about documents."""
        unset = Benchmark()
        given = [each.name for each in fields(Benchmark) if getattr(self, each.name) != getattr(unset, each.name)]
        return [f"--{name.replace('_', '-')}" for name in given if name not in _OF_DOCUMENTS]

    def of_documents(self) -> "list[EvaluateOptions]":
        """These options for the documents, as a benchmark; none where there are none."""
        if self.documents is None:
            return []
        documents = Benchmark(
            name="documents",
            data=self.documents,
            prompt_column=self.text_column,
            scoring="perplexity",
            **{name: getattr(self, name) for name in _OF_DOCUMENTS},
        )
        return [replace(self, **vars(documents), documents=None, text_column="text", benchmark=[], data_dir=None)]


def _default(each: "Field[Any]") -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _marked(run: EvaluateOptions, described: Mapping[str, Any]) -> EvaluateOptions:
    """`run` with published figures whose names say which of its options are other than its file `described` them."""
    hints, converter = hints_of(Benchmark), Converter(where=lambda key: "", suggest=lambda key: "")
    own = vars(Benchmark()) | {
        name: converter.value(hints[name], value, (name,)) for name, value in described.items() if name in hints
    }
    if run.paper != own["paper"]:
        return run
    names = (name for name in own if name not in _OF_NO_FIGURE and getattr(run, name) != own[name])
    changed = [option for name in names if (option := f"--{name.replace('_', '-')}") not in run.ignored()]
    other = f", with other {', '.join(changed)}" if changed else ""
    return replace(run, paper={f"{source}{other}": value for source, value in run.paper.items()})


def parse_benchmarks(argv: Sequence[str] | None = None, *, description: str | None = None) -> list[EvaluateOptions]:
    """The options of a command line, once for every benchmark that it names: those of the benchmark's file, and over
    them those of the command line; and once for its documents. Raises UserError with all that is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = cli.parse(EvaluateOptions, argv, description=description)
    if not options.benchmark:
        return options.with_documents()
    if options.data is not None:
        raise UserError("--data and --benchmark exclude each other: a benchmark names its data, see --data-dir")
    runs = []
    for name in options.benchmark:
        for files in files_of(name):
            words = [word for file in files for word in ("--recipe", str(file))]
            described = load_yaml(files[0])[0]
            if "name" not in described:
                words += ["--name", files[0].stem]
            runs.append(_marked(cli.parse(EvaluateOptions, [*words, *argv]), described))
    return [*runs, *options.of_documents()]
