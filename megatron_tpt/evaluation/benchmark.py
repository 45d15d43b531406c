"""Benchmarks: which rows, how a prompt is made of each, how the model answers, and how its answers are graded.

A benchmark is a YAML file of the fields of `Benchmark`: those of this package are in benchmarks/, and a file of your
own works the same. A suite is such a file that names others, `benchmark: [math500, aime24]`; what else it says
counts for all of them. Light to import: the help of the command line needs nothing else.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.convert import did_you_mean
from megatron_tpt.config.fields import PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError, failure
from megatron_tpt.generation import Sampling, Temperature, TopP
from megatron_tpt.grading import LETTERS, AnswerKind, Reading, Rules

FOLDER = Path(__file__).parent / "benchmarks"
"""The benchmarks and suites of this package."""
SHOWN = frozenset({"paper", "paper_problems", "paper_source", "note"})
"""What only the report shows."""
GRADING = frozenset(
    {"answer_column", "answer_columns", "answer_template", "code_prefix_column", "answer_type", "answer_pattern",
     "answer_position", "allow_unsandboxed_code", "code_time_limit_s", *SHOWN}
)  # fmt: skip
"""What decides only how outputs are graded and shown: it may change when outputs are graded again."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is asked, how, and when an answer is right."""

    name: str | None = None
    """What the benchmark is called in results and folders; by default the name of its file, or of its data."""
    data: str | Path | None = None
    """The problems, one a row: a file (.jsonl, .json, packed or not, .parquet, .arrow), a folder, a pattern, or a data
    set of the Hub (hf://owner/name?split=test&revision=COMMIT)."""
    data_file: str | None = None
    """The name of the file with the problems in --data-dir."""
    fetch: str | None = None
    """Where the problems come from and where to put them: shown when they are missing."""
    note: str | None = None
    """What a reader of the results should know about this benchmark or its protocol."""
    paper: dict[str, float] = field(default_factory=dict)
    """Published figures in percent, by what they are of, for the report."""
    paper_problems: PositiveInt | None = None
    """The number of problems that these figures are of: the report says so where others are asked."""
    paper_source: str | None = None
    """Where these figures are published, such as arXiv 2509.20186."""
    prompt_column: str = "prompt"
    """The column with the problem. `choices.text` is the field `text` of the column `choices`."""
    answer_column: str = "answer"
    """The column with the reference answer: text, a number, true or false, or a list. For code: its tests."""
    answer_columns: str | None = None
    """Several columns, with commas between them, that are the reference together, as for --answer-type instructions.
    """
    answer_template: str | None = None
    """Build the reference from columns, like the prompt: "{test}\\ncheck({entry_point})"."""
    choices_column: str | None = None
    """The column with the options of a multiple-choice problem, a list of texts. In the prompt template its name is
    replaced by them, one a line after (A), (B) and so on; without a template they follow the problem.
    """
    choice_columns: list[str] = field(default_factory=list)
    """The columns with one option each, in place of a column with all; `{choices}` in the template."""
    choice_texts: list[str] = field(default_factory=list)
    """The options of every problem, such as no and yes; `{choices}` in the template."""
    choice_labels: list[str] = field(default_factory=list)
    """What the answer column calls the options, in their order, where it is neither letters, numbers from 0 nor texts.
    """
    labels_column: str | None = None
    """The column with a list of such labels for each problem."""
    choice_format: str = "({letter}) {choice}"
    """How an option is shown; {letter} is A, B and so on."""
    choice_separator: str = "\\n"
    """What is between the options that are shown (\\n is a line break)."""
    shuffle_choices: bool = False
    """Put the options in an order that depends on the problem's id and --seed."""
    code_prefix_column: str | None = None
    """The column with what goes before the code of an answer, such as HumanEval's prompt."""
    id_column: str = "id"
    """The column with the problem's id; without it, the line's number (of several files, "file:line")."""
    prompt_template: str | None = None
    """Build the prompt from columns: "Question: {question}\\nAnswer:" (\\n is a line break), or a file with such a
    text. A column with a list of texts has one on each line.
    """
    few_shot: str | Path | None = None
    """Worked examples that go before every prompt: a text file, taken as it is, or rows (a file or hf://...) of which
    each is made an example by the template of shots.
    """
    few_shot_file: str | None = None
    """The name of the file with these rows in --data-dir."""
    shot_template: str = "{prompt}"
    """Build an example from the columns of a row of --few-shot, with {choices} where it has options."""
    shot_group: str | None = None
    """A column that examples and problems have: a problem's examples are those of its own group, such as its subject.
    """
    shot_begin: str | None = None
    """What every example in a text of examples begins with, after an empty line; needed to take some of them."""
    num_shots: PositiveInt | None = None
    """Take the first N examples; by default all."""
    chat: bool = False
    """Show the prompt to the model as a user's message, in its chat template."""
    begin_token: bool = True
    """Put the begin-of-sequence token before the prompt, for tokenizers that do so themselves."""
    scoring: Literal["generate", "log-likelihood", "perplexity"] = "generate"
    """Let the model write an answer, or take the option that it finds likeliest after the prompt. With perplexity,
    prompts are documents without answers, all of whose tokens are scored.
    """
    likelihood_of: Literal["choice", "letter", "rest"] = "choice"
    """With log-likelihood: of the option's text, of its letter, or of what follows the blank in the prompt once an
    option is in its place.
    """
    blank: str = "_"
    """The mark of the blank in the prompt, for --likelihood-of rest."""
    normalize_by: Literal["nothing", "characters"] = "nothing"
    """With log-likelihood: divide that of an option by its number of characters."""
    document_window: PositiveInt | None = None
    """With perplexity: longer documents are scored in windows of N tokens; by default what the model was made
    for, at most 2048.
    """
    answer_type: AnswerKind = "exact"
    """How answers are read and compared: as text; as a number; as mathematics, which needs math-verify; as one of the
    options A to J; as yes or no; as JEEBench's letters, integers and decimals; as a literal of Python; as a text
    that follows IFEval's instructions; as code that must pass its tests.
    """
    answer_pattern: str | None = None
    """A regular expression that finds the answer in the output: the last match, its first group."""
    answer_position: Literal["auto", "first", "last"] = "auto"
    """Which of several answers in an output counts. Base models continue into the next problem: take the first, after
    truncating at the stop texts. "auto" is "first" with few-shot examples and without --chat, else "last".
    """
    allow_unsandboxed_code: bool = False
    """Run the code of answers with your own rights where there is no sandbox (bubblewrap)."""
    code_time_limit_s: PositiveFloat | None = None
    """Processor time for the code of an answer and its tests; by default 10 seconds."""
    num_samples: PositiveInt = 1
    """Answers per problem; accuracy is their mean (pass@1)."""
    temperature: Temperature = 0.0
    """0 takes the likeliest token."""
    top_p: TopP = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    max_new_tokens: PositiveInt = 1024
    """Longest answer, thinking included, in tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, such as "Question:" after few-shot examples."""
    seed: int = 0
    """Every sample gets its own seed from this one, the problem's id and its number."""
    limit: PositiveInt | None = None
    """Take only the first N problems."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name):
            raise UserError(f"--name {self.name!r}: is that of a folder in the output, without slashes; choose another")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError("--num-samples above 1 needs --temperature above 0: greedy answers are all the same")
        if not all(self.stop):
            raise UserError("--stop: an empty text would end every answer at once; omit it")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise UserError(f"--answer-pattern {self.answer_pattern!r}: {error}") from error
        if self.answer_columns and self.answer_template:
            raise UserError("--answer-columns and --answer-template exclude each other: give one")
        if sum(map(bool, (self.choices_column, self.choice_columns, self.choice_texts))) > 1:
            raise UserError("--choices-column, --choice-columns and --choice-texts exclude each other: give one")
        has_choices = bool(self.choices_column or self.choice_columns or self.choice_texts)
        for name, given in (("columns", self.choice_columns), ("texts", self.choice_texts)):
            if given and not 2 <= len(given) <= len(LETTERS):
                raise UserError(f"--choice-{name}: {len(given)} given; give 2 to {len(LETTERS)} options")
        if self.scoring == "log-likelihood":
            self._check_scoring(has_choices)
        if self.scoring == "perplexity" and (
            has_choices or self.few_shot or self.few_shot_file or self.chat or self.num_samples > 1 or self.paper
        ):
            raise UserError(
                "--scoring perplexity is of documents, which are scored as they are: omit choices, --few-shot, --chat, "
                "--num-samples and --paper"
            )

    def _check_scoring(self, has_choices: bool) -> None:
        if not has_choices:
            raise UserError("--scoring log-likelihood compares options: give --choices-column or --choice-texts")
        if self.answer_type not in ("choice", "boolean"):
            raise UserError("--scoring log-likelihood needs --answer-type choice or boolean")
        if self.num_samples > 1:
            raise UserError("--scoring log-likelihood draws no samples: omit --num-samples")
        if self.likelihood_of == "rest" and not self.blank:
            raise UserError("--likelihood-of rest needs the mark of the blank: give --blank, such as _")

    @property
    def title(self) -> str:
        """What it is called in results and folders."""
        if self.name is not None:
            return self.name
        stem = str(self.data or self.data_file or "problems").partition("?")[0].rstrip("/").rpartition("/")[2]
        return re.sub(r"[^\w.-]", "_", stem.partition(".")[0]) or "problems"

    @property
    def has_examples(self) -> bool:
        """Whether worked examples go before every prompt."""
        return self.few_shot is not None or self.few_shot_file is not None

    @property
    def advice(self) -> str:
        """Where its data come from, for the end of a message; empty where it does not say so."""
        return f" ({self.fetch})" if self.fetch else ""

    def file_in(self, data_dir: Path, name: str, what: str) -> Path:
        """A file of its in --data-dir. Raises UserError where it is missing, saying `what` it is to hold."""
        path = data_dir / name
        if not path.exists():
            raise UserError(f"{self.title}: {path} is missing; put {what} there{self.advice}")
        return path

    def rules(self) -> Rules:
        """How the outputs are graded."""
        first = self.answer_position == "first" or (
            self.answer_position == "auto" and self.has_examples and not self.chat
        )
        reading = Reading(first, tuple(self.stop), self.answer_pattern)
        if self.scoring == "log-likelihood":
            reading = Reading()  # the output is ours: the likeliest option
        rules = Rules(self.answer_type, reading, self.allow_unsandboxed_code)
        return rules if self.code_time_limit_s is None else replace(rules, code_time_limit_s=self.code_time_limit_s)

    def sampling(self) -> Sampling:
        """The sampling of its answers."""
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, tuple(self.stop), self.seed)

    def settings(self) -> dict[str, Any]:
        """Its fields as JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(Benchmark)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def names() -> list[str]:
    """The benchmarks and suites of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def files_of(name: str) -> list[list[Path]]:
    """For every benchmark that `name` stands for, the files of options that describe it: a later one wins.

    `name` is a benchmark or suite of this package, or the path of a YAML file. Raises UserError for one that is not
    there, and for a suite within itself.
    """
    return _expand(_path(name), ())


def _expand(path: Path, inside: tuple[Path, ...]) -> list[list[Path]]:
    if path in inside:
        raise UserError(f"{path}: is a suite within itself")
    try:
        content = load_yaml(path)[0]
    except OSError as error:
        raise failure(f"{path}: cannot be read ({error.strerror})", error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a benchmark is a list of options, as in `prompt_column: question`")
    if "benchmark" not in content:
        return [[path]]
    members = content["benchmark"] if isinstance(content["benchmark"], list) else [content["benchmark"]]
    if not members:
        raise UserError(f"{path}: names no benchmark; name some, as in `benchmark: [math500, aime24]`")
    return [[*files, path] for member in members for files in _expand(_path(str(member)), (*inside, path))]


def _path(name: str) -> Path:
    own = FOLDER / f"{name}.yaml"
    if name in names():
        return own
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name).expanduser()
    hint = did_you_mean(name, names()) or f"; known are {', '.join(names())}"
    raise UserError(f"--benchmark {name}: unknown{hint} (a file of your own ends in .yaml)")
