"""How a benchmark was asked and graded, in words: what decides its scores, from the settings in results.json."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.names import counted

_MAX_TEMPLATE = 300
"""Characters of a template; of what is longer, the end is what the model continues."""

_OF_WHOLE_OUTPUT = ("exact", "literal", "instructions")


def protocol(settings: Mapping[str, Any]) -> str:
    """A line on how the benchmark of these settings (an entry of `benchmarks`) was asked."""
    names = {each.name for each in fields(Benchmark)}
    benchmark = Benchmark(**{name: value for name, value in settings.items() if name in names})
    words = [f"{_problems(settings)} of {settings['data']} ({settings['data_sha256'][:19]})"]
    if benchmark.scoring == "perplexity":
        words.append("log-likelihood of all tokens")
    else:
        words += [*_asked(benchmark), *_answered(benchmark)]
    return "; ".join([*words, benchmark.note] if benchmark.note else words)


def _problems(settings: Mapping[str, Any]) -> str:
    number, rows = settings["num_problems"], settings.get("num_rows")
    if settings["limit"] is None or number < settings["limit"] or number == rows:
        return counted(number, "problem")
    return f"the first {number:,} of {counted(rows, 'problem')}" if rows else f"the first {counted(number, 'problem')}"


def _asked(benchmark: Benchmark) -> Iterator[str]:
    """How a problem was shown to the model."""
    if benchmark.chat:
        yield "in the chat template"
    else:
        yield "as plain text, without the chat template"
    if benchmark.has_examples:
        source = benchmark.few_shot or benchmark.few_shot_file
        number = f"all worked examples of {source}" if benchmark.num_shots is None else (
            f"{counted(benchmark.num_shots, 'worked example')} of {source}"
        )  # fmt: skip
        yield f"{number}, by {benchmark.shot_group}" if benchmark.shot_group else number
    else:
        yield "no worked examples"
    template = benchmark.prompt_template
    yield f"prompt: column {benchmark.prompt_column}" if template is None else f"prompt {_shown(template)}"


def _answered(benchmark: Benchmark) -> Iterator[str]:
    """How it was answered, and where the answer was looked for."""
    if benchmark.scoring == "log-likelihood":
        by = ", by character" if benchmark.normalize_by == "characters" else ""
        yield f"log-likelihood of the options ({benchmark.likelihood_of}{by})"
        return
    greedy = benchmark.temperature == 0
    how = "greedy" if greedy else f"temperature {benchmark.temperature}, top-p {benchmark.top_p}"
    yield f"{counted(benchmark.num_samples, 'sample')} per problem, {how}, seed {benchmark.seed}"
    yield f"at most {benchmark.max_new_tokens:,} new tokens"
    yield "stop texts: " + (" ".join(map(_shown, benchmark.stop)) or "none")
    reading = benchmark.rules().reading
    which = "first" if reading.first else "last"
    if reading.pattern:
        where = f"the {which} match of {_shown(reading.pattern)}"
    elif benchmark.answer_type in _OF_WHOLE_OUTPUT:
        where = "the whole output"
    else:
        where = "the last code block" if benchmark.answer_type == "code" else f"the {which} answer in the output"
    yield f"answer type {benchmark.answer_type}: {where} counts"


def _shown(text: str) -> str:
    """A text in quotes, with its line breaks as on a command line."""
    shortened = text if len(text) <= _MAX_TEMPLATE else f"...{text[-_MAX_TEMPLATE:]}"
    return '"' + shortened.replace("\n", "\\n") + '"'
