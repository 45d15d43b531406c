"""Reports of an evaluation: report.md, models by benchmarks, and report.html, failing samples to read.

Whatever models wrote and data held is untrusted: it shows as text, and nothing in it is markup. The page needs no
network and runs no script, and forbids both.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt import markdown
from megatron_tpt.evaluation.arms import label
from megatron_tpt.evaluation.samples import Sample
from megatron_tpt.files import atomic_write
from megatron_tpt.names import shown_lines

_MAX_FAILING = 200
"""Failing samples of a model and benchmark that the page shows."""
_MAX_CHARACTERS = 20_000
"""Of a prompt or an output; what is omitted in the middle is counted."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; margin: 1rem 0; overflow-x: auto; }
td, th { border: 1px solid #999; padding: .2rem .6rem; }
td + td, th + th { text-align: right; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881;
padding: .6rem; } details { margin: .3rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
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
    """Header and rows: models by benchmarks, and below them the figures that papers published."""
    names = [name for name, each in content["benchmarks"].items() if each["scoring"] != "perplexity"]
    cells: dict[str, dict[str, str]] = {}
    for result in content["models"]:
        cells.setdefault(_label(result), {})[result["benchmark"]] = accuracy_cell(result)
    for name in names:
        for source, value in content["benchmarks"][name]["paper"].items():
            cells.setdefault(f"published: {source}", {})[name] = f"{value:.1f}"
    return ["model", *names], [[model, *(own.get(name, "") for name in names)] for model, own in cells.items()]


def detail_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a reader needs to know before believing an accuracy."""
    header = ["model", "benchmark", "problems", "samples", "std. error", "no answer", "thinking not closed",
              "truncated", "failed requests", "time-outs / crashes", "thinking tokens, mean / p95",
              "answer tokens, mean / p95", "pass@k", "majority@k", "spread"]  # fmt: skip
    rows = []
    for r in content["models"]:
        rows.append(
            [_label(r), r["benchmark"], f"{r['num_problems']:,}", str(r["num_samples"]), _percent(r["stderr"]),
             f"{r['extraction_failures']:,}", f"{r['unclosed_thinking']:,}", _percent(r["truncated_fraction"]),
             f"{r['failed_requests']:,}", f"{r['grading_timeouts']:,} / {r['grading_crashes']:,}",
             " / ".join(f"{value:,.0f}" for value in r["thinking_tokens"]),
             " / ".join(f"{value:,.0f}" for value in r["answer_tokens"]),
             _at(r["pass_at"]), _at(r["majority_at"]), _percent(r["spread"])]
        )  # fmt: skip
    return header, rows


def comparison_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the paired differences in percentage points."""
    rows = []
    for each in content["comparisons"]:
        interval = each["interval"]
        shown = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
        p_value = "" if each["p_value"] is None else f"{each['p_value']:.3g}"
        names = [_label(each), label(each["than"], each["than_recurrences"]), each["benchmark"]]
        rows.append([*names, f"{100 * each['difference']:+.1f}{shown}", p_value, f"{each['num_problems']:,}"])
    return ["model", "than", "benchmark", "difference [95%]", "p", "problems"], rows


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


_Table = tuple[list[str], list[list[str]]]


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, _Table]]:
    """The tables of both pages that have rows, with their headings."""
    if content["models"]:
        yield "pass@1 in percent, with its 95% interval over problems", accuracy_table(content)
        yield "Before you believe a figure", detail_table(content)
    if content["comparisons"]:
        yield "Differences, paired by problem", comparison_table(content)
    if content.get("contamination"):
        yield "Problems that training corpora held", contamination_table(content)
    if content["documents"]:
        yield "Perplexity of documents", document_table(content)


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of figures."""
    parts = ["# Evaluation"]
    for heading, table in _tables(content):
        parts += [f"\n## {heading}\n", markdown.table(*table)]
    parts += ["\n## How it was measured\n", *_provenance(content)]
    return "\n".join(parts) + "\n"


def _provenance(content: Mapping[str, Any]) -> Iterator[str]:
    engine, environment = content["engine"], content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in _all_versions(content).items())
    hardware = environment["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    rule = engine["early_exit"]
    exits = "" if rule is None else f", early exit at {rule['criterion']} below {rule['threshold']}"
    dtypes = ", ".join(sorted(set(engine.get("computed_in", {}).values()))) or engine["dtype"]
    yield f"- engine {markdown.inline(engine['kind'])}, {dtypes}{exits}; {markdown.inline(versions)}"
    yield f"- {markdown.inline(machine)}; revision {environment['package']['git_revision'] or 'unknown'}"
    for name, each in content["benchmarks"].items():
        words = [f"{each['num_problems']:,} problems of {each['data']} ({each['data_sha256'][:19]})"]
        if each["scoring"] == "generate":
            words.append(
                f"{each['num_samples']} samples, temperature {each['temperature']}, top-p {each['top_p']}, "
                f"{each['max_new_tokens']:,} new tokens, seed {each['seed']}"
            )
        elif each["scoring"] == "perplexity":
            words.append("log-likelihood of all tokens")
        else:
            words.append("log-likelihood of the options")
        words += [each["note"]] if each["note"] else []
        yield f"- **{markdown.inline(name)}**: {markdown.inline('; '.join(words))}"


def _all_versions(content: Mapping[str, Any]) -> dict[str, str]:
    return content["engine"]["versions"] | content["grading"]["versions"]


def as_html(content: Mapping[str, Any], graded: Sequence[Sequence[Sample]]) -> Iterator[str]:
    """The page of figures and failing samples, in pieces."""
    yield "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<title>Evaluation</title>\n"
    yield "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Evaluation</h1>\n"
    for heading, table in _tables(content):
        yield f"<h2>{heading}</h2>\n"
        yield from _html_table(*table)
    for result, samples in zip(content["models"], graded, strict=True):
        failing = [sample for sample in samples if not sample.correct]
        yield f"<h2>{_text(_label(result))}, {_text(result['benchmark'])}</h2>\n"
        more = f" The first {_MAX_FAILING} are here." if len(failing) > _MAX_FAILING else ""
        yield f"<p>{len(failing):,} of {len(samples):,} samples are wrong.{more} All: {_text(result['samples'])}</p>\n"
        for sample in failing[:_MAX_FAILING]:
            yield from _html_sample(sample)
    yield "</body>\n</html>\n"


def _html_sample(sample: Sample) -> Iterator[str]:
    why = sample.reason or ""
    read = f"read {sample.extracted!s}" if sample.extracted is not None else "nothing read"
    head = f"{sample.id}, sample {sample.sample}: {why}; {read}, expected {sample.reference!s}"
    yield f"<details><summary>{_text(head[:300])}</summary>\n"
    facts = f"{sample.output_tokens:,} tokens, {sample.thinking_tokens:,} of them thinking; {sample.finish_reason}"
    yield f"<p>{_text(facts)}{_text('; ' + sample.detail) if sample.detail else ''}</p>\n"
    yield f"<h4>Prompt</h4><pre>{_text(_shortened(sample.prompt))}</pre>\n"
    yield f"<h4>Output</h4><pre>{_text(_shortened(sample.output))}</pre></details>\n"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table>\n<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>\n"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n"
    yield "</table>\n"


def _text(text: str) -> str:
    """A text in HTML, with control characters shown as escapes."""
    return html.escape(shown_lines(text), quote=True)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - _MAX_CHARACTERS:,} characters ...]\n{text[-half:]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _at(values: Mapping[str, float]) -> str:
    return ", ".join(f"@{k} {100 * value:.1f}" for k, value in values.items())
