"""Reports of an evaluation: report.md, models by benchmarks, and report.html, failing samples to read.

Whatever models wrote and data held is untrusted: it shows as text, and nothing in it is markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tpt import html_page, markdown
from megatron_tpt.evaluation.arms import label
from megatron_tpt.evaluation.samples import Sample
from megatron_tpt.files import atomic_write
from megatron_tpt.html_page import as_text

_MAX_FAILING = 200
"""Failing samples of a model and benchmark that the page shows."""
_MAX_CHARACTERS = 20_000
"""Of a prompt or an output; what is omitted in the middle is counted."""
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
        yield name, "; ".join(words)


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
    for heading, table in _tables(content):
        yield f"<h2>{heading}</h2>\n"
        yield from html_page.table(*table)
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
        for sample in failing[:_MAX_FAILING]:
            yield from _html_sample(sample)


def _html_sample(sample: Sample) -> Iterator[str]:
    why = sample.reason or ""
    read = f"read {sample.extracted!s}" if sample.extracted is not None else "nothing read"
    head = f"{sample.id}, sample {sample.sample}: {why}; {read}, expected {sample.reference!s}"
    yield f"<details><summary>{as_text(head[:300])}</summary>\n"
    facts = f"{sample.output_tokens:,} tokens, {sample.thinking_tokens:,} of them thinking; {sample.finish_reason}"
    yield f"<p>{as_text(facts)}{as_text('; ' + sample.detail) if sample.detail else ''}</p>\n"
    yield f"<h4>Prompt</h4><pre>{as_text(_shortened(sample.prompt))}</pre>\n"
    yield f"<h4>Output</h4><pre>{as_text(_shortened(sample.output))}</pre></details>\n"


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - _MAX_CHARACTERS:,} characters ...]\n{text[-half:]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def _at(values: Mapping[str, float]) -> str:
    return ", ".join(f"@{k} {100 * value:.1f}" for k, value in values.items())
