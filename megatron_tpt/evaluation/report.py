"""Reports of an evaluation: report.md, models by benchmarks, and report.html, failing samples to read.

Whatever models wrote and data held is untrusted: it shows as text, and nothing in it is markup.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt import html_page, markdown
from megatron_tpt.evaluation.arms import label
from megatron_tpt.evaluation.protocol import protocol
from megatron_tpt.evaluation.samples import Sample
from megatron_tpt.files import atomic_write
from megatron_tpt.grading import AnswerKind, reference_text
from megatron_tpt.html_page import as_text

_MAX_FAILING = 200
"""Failing samples of a model and benchmark that the page shows."""
_MAX_CHARACTERS = 20_000
"""Of a prompt or an output; what is omitted in the middle is counted."""
_MAX_TRUNCATED, _MAX_UNCLOSED, _MAX_NO_ANSWER = 0.05, 0.05, 0.2
"""Shares of samples above which a figure says more about how it was measured than about the model."""
_PROVENANCE = "How it was measured"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; margin: 1rem 0; overflow-x: auto; }
td, th { border: 1px solid #999; padding: .2rem .6rem; }
td + td, th + th { text-align: right; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881;
padding: .6rem; } details { margin: .3rem 0; } li, summary { overflow-wrap: anywhere; } summary { cursor: pointer; }
:root { color-scheme: light dark; }
"""


def write_reports(output: Path, content: Mapping[str, Any], graded: Sequence[Sequence[Sample]]) -> None:
    """Write report.md and report.html from what results.json holds and the samples of its `models`, in their order."""
    with atomic_write(output / "report.md") as temporary:
        temporary.write_text(as_markdown(content), encoding="utf-8")
    with atomic_write(output / "report.html") as temporary:
        temporary.write_text("".join(as_html(content, graded)), encoding="utf-8", errors="replace")


def accuracy_cell(result: Mapping[str, Any]) -> str:
    """Accuracy in percent with its interval."""
    low, high = result["interval"]
    return f"{100 * result['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def accuracy_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: models by benchmarks, and below them the figures that papers published, with the number of
    problems that they are of where it is another."""
    names = [name for name, each in content["benchmarks"].items() if each["scoring"] != "perplexity"]
    cells: dict[str, dict[str, str]] = {}
    for result in content["models"]:
        cells.setdefault(_label(result), {})[result["benchmark"]] = accuracy_cell(result)
    for name in names:
        benchmark = content["benchmarks"][name]
        for source, value in benchmark["paper"].items():
            cells.setdefault(f"published: {source}", {})[name] = f"{value:.1f}{_of_others(benchmark)}"
    return ["model", *names], [[model, *(own.get(name, "") for name in names)] for model, own in cells.items()]


def _of_others(benchmark: Mapping[str, Any]) -> str:
    """What to add to a published figure that is of other problems than those asked here."""
    number, asked = benchmark["paper_problems"], benchmark["num_problems"]
    if number is None:
        return " (of all problems)" if asked == benchmark["limit"] else ""
    return "" if asked == number else f" (of {number:,} problems)"


def detail_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a reader needs to know before believing an accuracy. Nothing is written, truncated or read
    where options are scored."""
    header = ["model", "benchmark", "problems", "samples per problem", "std. error (points)",
              "no answer (% of samples)", "thinking not closed (% of samples)", "truncated (% of samples)",
              "failed requests", "time-outs / crashes (samples)", "thinking tokens, mean / p95",
              "answer tokens, mean / p95", "pass@k (%)", "majority@k (%)", "spread (points)"]  # fmt: skip
    rows = []
    for r in content["models"]:
        shares = [f"{100 * share:.1f}" for share in _shares(r)]
        tokens = [" / ".join(f"{value:,.0f}" for value in r[name]) for name in ("thinking_tokens", "answer_tokens")]
        if content["benchmarks"][r["benchmark"]]["scoring"] == "log-likelihood":
            shares, tokens = ["-"] * len(shares), ["-"] * len(tokens)
        rows.append(
            [_label(r), r["benchmark"], f"{r['num_problems']:,}", str(r["num_samples"]), _points(r["stderr"]), *shares,
             f"{r['failed_requests']:,}", f"{r['grading_timeouts']:,} / {r['grading_crashes']:,}", *tokens,
             _at(r["pass_at"]), _at(r["majority_at"]), _points(r["spread"])]
        )  # fmt: skip
    return header, rows


def _shares(result: Mapping[str, Any]) -> tuple[float, float, float]:
    """The shares of samples without an answer, with thinking that was not closed, and truncated."""
    number = result["num_problems"] * result["num_samples"]
    return result["extraction_failures"] / number, result["unclosed_thinking"] / number, result["truncated_fraction"]


def doubts(content: Mapping[str, Any]) -> list[str]:
    """What is wrong with figures that should not be believed as they are, and what to change: a sentence each."""
    found = []
    for result in content["models"]:
        no_answer, unclosed, truncated = _shares(result)
        place = f"{_label(result)}, {result['benchmark']}"
        if truncated > _MAX_TRUNCATED:
            found.append(f"{place}: {_percent(truncated)} of samples are truncated; raise --max-new-tokens")
        if unclosed > _MAX_UNCLOSED:
            found.append(
                f"{place}: thinking is not closed in {_percent(unclosed)} of samples; raise --max-new-tokens, or see "
                "in report.html whether it repeats itself"
            )
        if no_answer - unclosed > _MAX_NO_ANSWER:
            found.append(
                f"{place}: no answer is found in {_percent(no_answer - unclosed)} of samples, apart from thinking that "
                "is not closed; read some in report.html, then give another --answer-type or --answer-pattern with "
                "--rescore, or have the prompt ask for the form (--prompt-template, --few-shot, --chat)"
            )
    return found


def published_sources(content: Mapping[str, Any]) -> list[str]:
    """Where the published figures come from, a sentence for each source."""
    names: dict[str, list[str]] = {}
    for name, benchmark in content["benchmarks"].items():
        if benchmark["paper"] and benchmark["paper_source"]:
            names.setdefault(benchmark["paper_source"], []).append(name)
    return [f"Published figures of {', '.join(own)}: {source}" for source, own in names.items()]


def comparison_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the paired differences in percentage points."""
    rows = []
    for each in content["comparisons"]:
        interval = each["interval"]
        shown = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
        p_value = "" if each["p_value"] is None else f"{each['p_value']:.3g}"
        names = [_label(each), label(each["than"], each["than_recurrences"]), each["benchmark"]]
        rows.append([*names, f"{100 * each['difference']:+.1f}{shown}", p_value, f"{each['num_problems']:,}"])
    return ["model", "compared with", "benchmark", "difference [95%]", "p", "problems"], rows


def contamination_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many problems training corpora held, and the accuracy on the others."""
    rows = []
    for each in content["contamination"]:
        number = each["num_overlapping"]
        overlap = "not searched for" if number is None else f"{number:,} of {each['num_problems']:,}"
        rows.append([_label(each), each["benchmark"], each["corpus"], overlap, _percent(each["accuracy_without"])])
    return ["model", "benchmark", "corpus", "problems in it", "pass@1 without them"], rows


def document_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how well the models predict documents; empty where some could not be scored."""
    rows = [
        [_label(r), r["benchmark"], f"{r['num_documents']:,}", f"{r['num_tokens']:,}",
         *("" if r[name] is None else f"{r[name]:.4f}" for name in ("perplexity", "bits_per_byte"))]
        for r in content["documents"]
    ]  # fmt: skip
    return ["model", "benchmark", "documents", "tokens", "perplexity", "bits per byte"], rows


def _label(result: Mapping[str, Any]) -> str:
    return label(result["model"], result["recurrences"])


class _Section(NamedTuple):
    """A table with its heading, and the sentences below it, of which those on what is wrong are emphasized."""

    heading: str
    table: tuple[list[str], list[list[str]]]
    notes: Sequence[str] = ()
    doubts: Sequence[str] = ()


def _sections(content: Mapping[str, Any]) -> Iterator[_Section]:
    """The tables of both pages that have rows."""
    if content["models"]:
        heading = "pass@1 in percent, with its 95% interval over problems"
        yield _Section(heading, accuracy_table(content), notes=published_sources(content))
        yield _Section("Before you believe a figure", detail_table(content), doubts=doubts(content))
    if content["comparisons"]:
        yield _Section("Differences, paired by problem", comparison_table(content))
    if content.get("contamination"):
        yield _Section("Problems that training corpora held", contamination_table(content))
    if content["documents"]:
        yield _Section("Perplexity of documents", document_table(content))


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of figures."""
    parts = ["# Evaluation"]
    for section in _sections(content):
        parts += [f"\n## {section.heading}\n", markdown.table(*section.table)]
        notes = [*(f"**{markdown.inline(text)}.**" for text in section.doubts), *map(_sentence, section.notes)]
        parts += [f"\n{text}" for text in notes]
    parts.append(f"\n## {_PROVENANCE}\n")
    for name, text in _provenance(content):
        parts.append(
            f"- **{markdown.inline(name)}**: {markdown.inline(text)}" if name else f"- {markdown.inline(text)}"
        )
    return "\n".join(parts) + "\n"


def _provenance(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts of both pages on how figures were made, as plain texts: of a benchmark with its name, else with ""."""
    engine, environment = content["engine"], content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in _all_versions(content).items())
    runs = [run for one in content.get("provenance", ()) for run in one["runs"]] or [environment]
    rule = engine["early_exit"]
    exits = "" if rule is None else f", early exit at {rule['criterion']} below {rule['threshold']}"
    dtypes = ", ".join(sorted(set(engine.get("computed_in", {}).values()))) or engine["dtype"]
    yield "", f"engine {engine['kind']}, {dtypes}{exits}; {versions}"
    yield from (("", machine) for machine in dict.fromkeys(map(_machine, runs)))
    yield from ((name, protocol(each)) for name, each in content["benchmarks"].items())
    yield "", f"report of {datetime.date.today():%Y-%m-%d}"


def _machine(run: Mapping[str, Any]) -> str:
    """Where and by which revision answers were made."""
    hardware = run["hardware"] or {"gpus": ["servers of others"]}
    machine = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    return f"{machine}; revision {run['package']['git_revision'] or 'unknown'}"


def _all_versions(content: Mapping[str, Any]) -> dict[str, str]:
    return content["engine"]["versions"] | content["grading"]["versions"]


def as_html(content: Mapping[str, Any], graded: Sequence[Sequence[Sample]]) -> Iterator[str]:
    """The page of figures and failing samples, in pieces."""
    return html_page.page("Evaluation", _STYLE, _body(content, graded))


def _body(content: Mapping[str, Any], graded: Sequence[Sequence[Sample]]) -> Iterator[str]:
    for section in _sections(content):
        yield f"<h2>{section.heading}</h2>\n"
        yield from html_page.table(*section.table)
        yield from (f"<p><b>{as_text(text)}.</b></p>\n" for text in section.doubts)
        yield from (f"<p>{as_text(text)}.</p>\n" for text in section.notes)
    yield f"<h2>{_PROVENANCE}</h2>\n<ul>\n"
    for name, text in _provenance(content):
        yield f"<li>{f'<b>{as_text(name)}</b>: ' if name else ''}{as_text(text)}</li>\n"
    yield "</ul>\n"
    for result, samples in zip(content["models"], graded, strict=True):
        failing = [sample for sample in samples if not sample.correct]
        yield f"<h2>{as_text(_label(result))}, {as_text(result['benchmark'])}</h2>\n"
        more = f" The first {_MAX_FAILING} are here." if len(failing) > _MAX_FAILING else ""
        wrong = f"{len(failing):,} of {len(samples):,} samples are wrong.{more} All: {result['samples']}"
        yield f"<p>{as_text(wrong)}</p>\n"
        kind = content["benchmarks"][result["benchmark"]]["answer_type"]
        for sample in failing[:_MAX_FAILING]:
            yield from _html_sample(sample, kind)


def _html_sample(sample: Sample, kind: AnswerKind) -> Iterator[str]:
    why = sample.reason or ""
    read = f"read {sample.extracted!s}" if sample.extracted is not None else "nothing read"
    expected = reference_text(kind, sample.reference)
    head = f"{sample.id}, sample {sample.sample}: {why}; {read}, expected {expected}"
    yield f"<details><summary>{as_text(head[:300])}</summary>\n"
    facts = f"{sample.output_tokens:,} tokens, {sample.thinking_tokens:,} of them thinking; {sample.finish_reason}"
    yield f"<p>{as_text(facts)}{as_text('; ' + sample.detail) if sample.detail else ''}</p>\n"
    yield f"<h4>Prompt</h4><pre>{as_text(_shortened(sample.prompt))}</pre>\n"
    if expected != str(sample.reference):
        yield f"<h4>Reference</h4><pre>{as_text(_shortened(str(sample.reference)))}</pre>\n"
    yield f"<h4>Output</h4><pre>{as_text(_shortened(sample.output))}</pre></details>\n"


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - _MAX_CHARACTERS:,} characters ...]\n{text[-half:]}"


def _sentence(text: str) -> str:
    return f"{markdown.inline(text)}."


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _at(values: Mapping[str, float]) -> str:
    return ", ".join(f"@{k} {100 * value:.1f}" for k, value in values.items())
