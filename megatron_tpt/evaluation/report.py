"""Reports of an evaluation: report.md, models by benchmarks, and report.html, failing samples to read.

Whatever models wrote and data held is untrusted: it shows as text, and nothing in it is markup. The page needs no
network and runs no script, and forbids both.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt import markdown
from megatron_tpt.evaluation.samples import Sample
from megatron_tpt.files import atomic_write
from megatron_tpt.names import shown_lines

_MAX_FAILING = 200
"""Failing samples of a model and benchmark that the page shows."""
_MAX_CHARACTERS = 20_000
"""Of a prompt or an output; what is left out in the middle is counted."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #999; padding: .2rem .6rem; }
td + td, th + th { text-align: right; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881;
padding: .6rem; } details { margin: .3rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
:root { color-scheme: light dark; }
"""


def write_reports(output: Path, content: Mapping[str, Any], graded: Sequence[Sequence[Sample]]) -> None:
    """Write report.md and report.html from what results.json holds and the samples of its results, in their order."""
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
    names = list(content["benchmarks"])
    cells: dict[str, dict[str, str]] = {}
    for result in content["models"]:
        cells.setdefault(result["model"], {})[result["benchmark"]] = accuracy_cell(result)
    for name, benchmark in content["benchmarks"].items():
        for source, value in benchmark["paper"].items():
            cells.setdefault(f"published: {source}", {})[name] = f"{value:.1f}"
    return ["model", *names], [[model, *(own.get(name, "") for name in names)] for model, own in cells.items()]


def detail_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a reader needs to know before believing an accuracy."""
    header = ["model", "benchmark", "problems", "samples", "std. error", "no answer", "thinking not closed",
              "truncated", "failed requests", "time-outs", "thinking tokens, mean / p95", "answer tokens, mean / p95",
              "pass@k", "majority@k", "spread"]  # fmt: skip
    rows = []
    for r in content["models"]:
        rows.append(
            [r["model"], r["benchmark"], f"{r['num_problems']:,}", str(r["num_samples"]), _percent(r["stderr"]),
             f"{r['extraction_failures']:,}", f"{r['unclosed_thinking']:,}", _percent(r["truncated_fraction"]),
             f"{r['failed_requests']:,}", f"{r['grading_timeouts']:,}",
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
        names = [each["model"], each["than"], each["benchmark"]]
        rows.append([*names, f"{100 * each['difference']:+.1f}{shown}", p_value, f"{each['num_problems']:,}"])
    return ["model", "than", "benchmark", "difference [95%]", "p", "problems"], rows


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of figures."""
    parts = [
        "# Evaluation\n",
        "pass@1 in percent, with its 95% interval over problems.\n",
        markdown.table(*accuracy_table(content)),
        "\n## Before you believe a figure\n",
        markdown.table(*detail_table(content)),
    ]
    if content["comparisons"]:
        parts += ["\n## Differences, paired by problem\n", markdown.table(*comparison_table(content))]
    parts += ["\n## How it was measured\n", *_provenance(content)]
    return "\n".join(parts) + "\n"


def _provenance(content: Mapping[str, Any]) -> Iterator[str]:
    engine, environment = content["engine"], content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in _all_versions(content).items())
    hardware = environment["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"
    yield f"- engine {markdown.inline(engine['kind'])}, dtype {engine['dtype']}; {markdown.inline(versions)}"
    yield f"- {markdown.inline(machine)}; revision {environment['package']['git_revision'] or 'unknown'}"
    for name, each in content["benchmarks"].items():
        words = [f"{each['num_problems']:,} problems of {each['data']} ({each['data_sha256'][:19]})"]
        if each["scoring"] == "generate":
            words.append(
                f"{each['num_samples']} samples, temperature {each['temperature']}, top-p {each['top_p']}, "
                f"{each['max_new_tokens']:,} new tokens, seed {each['seed']}"
            )
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
    yield "<p>pass@1 in percent, with its 95% interval over problems.</p>\n"
    yield from _html_table(*accuracy_table(content))
    yield "<h2>Before you believe a figure</h2>\n"
    yield from _html_table(*detail_table(content))
    if content["comparisons"]:
        yield "<h2>Differences, paired by problem</h2>\n"
        yield from _html_table(*comparison_table(content))
    for result, samples in zip(content["models"], graded, strict=True):
        failing = [sample for sample in samples if not sample.correct]
        yield f"<h2>{_text(result['model'])}, {_text(result['benchmark'])}</h2>\n"
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
