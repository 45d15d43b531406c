"""The options of `tools/evaluate.py`. Light to import: the help of the command line needs nothing else."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tpt.config.fields import PositiveFloat, PositiveInt, check_bounds
from megatron_tpt.errors import UserError
from megatron_tpt.generation import DType, EarlyExit, ExitCriterion, Sampling, Temperature, TopP
from megatron_tpt.grading import AnswerKind, Reading, Rules


@dataclass(frozen=True)
class EvaluateOptions:
    """Which models answer which problems, how their answers are read, and which documents measure perplexity."""

    model: list[str]
    """Hugging Face model folders or Hub ids; several are evaluated one after another."""
    output: Path
    """The folder for results.json and, in a folder per model, samples.jsonl."""
    data: str | Path | None = None
    """The problems, one a row: a file (.jsonl, .json, packed or not, .parquet, .arrow), a folder, a pattern, or a data
    set of the Hub (hf://owner/name?split=test)."""
    documents: str | Path | None = None
    """Texts whose perplexity is measured, one a row, wherever problems may be too."""
    text_column: str = "text"
    """The column with the document."""
    document_window: PositiveInt | None = None
    """Longer documents are scored in windows of so many tokens; by default what the model was made for, at most 2048.
    """
    prompt_column: str = "prompt"
    """The column with the problem."""
    answer_column: str = "answer"
    """The column with the reference answer: text, a number, true or false, or a list. For code: its tests."""
    answer_template: str | None = None
    """Build the reference from columns, like the prompt: "{test}\\ncheck({entry_point})"."""
    choices_column: str | None = None
    """The column with the options of a multiple-choice problem, a list of texts. In the prompt template its name is
    replaced by them, one a line after (A), (B) and so on; without a template they follow the problem.
    """
    code_prefix_column: str | None = None
    """The column with what goes before the code of an answer, such as HumanEval's prompt."""
    id_column: str = "id"
    """The column with the problem's id; without it, the line's number (of several files, "file:line")."""
    prompt_template: str | None = None
    """Build the prompt from columns: "Question: {question}\\nAnswer:" (\\n is a line break), or a file with such a
    text.
    """
    few_shot: Path | None = None
    """A text file of worked examples that goes before every prompt as it is."""
    chat: bool = False
    """Show the prompt to the model as a user's message, in its chat template."""
    begin_token: bool = True
    """Put the begin-of-sequence token before the prompt, for tokenizers that do so themselves."""
    answer_type: AnswerKind = "exact"
    """How answers are read and compared: as text; as a number; as mathematics, which needs math-verify; as one of the
    options A to J; as yes or no; as JEEBench's letters, integers and decimals; as code that must pass its tests.
    """
    answer_pattern: str | None = None
    """A regular expression that finds the answer in the output: the last match, its first group."""
    answer_position: Literal["auto", "first", "last"] = "auto"
    """Which of several answers in an output counts. Base models continue into the next problem: take the first, after
    truncating at the stop texts. "auto" is "first" with few-shot examples and without --chat, else "last".
    """
    allow_unsandboxed_code: bool = False
    """Run the code of answers with your own rights where there is no sandbox (bubblewrap)."""
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
    """Take only the first N problems, and the first N documents."""
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
    engine: Literal["vllm", "transformers"] = "vllm"
    """What generates: vLLM, or transformers, which is slow."""
    dtype: DType = "auto"
    """Number format of the model; "auto" is what its config.json says."""
    tensor_parallel_size: PositiveInt = 1
    """Number of devices that share the model."""
    max_num_seqs: PositiveInt | None = None
    """Most answers computed at once; by default 256 on CPUs and vLLM's own choice on GPUs."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.model:
            raise UserError("no model was given")
        if self.data is None and self.documents is None:
            raise UserError("nothing to evaluate: give --data with problems, --documents with texts, or both")
        if (self.exit_criterion is None) != (self.exit_threshold is None):
            raise UserError("early exit needs --exit-criterion and --exit-threshold: give both, or neither")
        if self.training_flops and (self.recurrences is None or len(self.training_flops) != len(self.model)):
            raise UserError("--training-flops: give one number for each --model, and --recurrences")
        self.depths()
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError("--num-samples above 1 needs --temperature above 0: greedy answers are all the same")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise UserError(f"--answer-pattern {self.answer_pattern!r}: {error}") from error

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

    def rules(self) -> Rules:
        """How the outputs are graded."""
        first = self.answer_position == "first" or (
            self.answer_position == "auto" and self.few_shot is not None and not self.chat
        )
        return Rules(
            self.answer_type, Reading(first, tuple(self.stop), self.answer_pattern), self.allow_unsandboxed_code
        )

    def sampling(self) -> Sampling:
        """The sampling these options ask for."""
        return Sampling(self.temperature, self.top_p, self.max_new_tokens, tuple(self.stop), self.seed)
