"""Texts of others are shown as they are, in Markdown, on the terminal and in figures: none of them is markup."""

import io
import re

import pytest
from rich.console import Console

from megatron_tpt.corpus.report import Report
from megatron_tpt.markdown import code, inline, table
from megatron_tpt.names import shown, shown_lines
from megatron_tpt.rich_text import plain, plotted
from megatron_tpt.studies.report import write_report
from megatron_tpt.studies.results import Summary
from megatron_tpt.thinking.card import card
from megatron_tpt.thinking.statistics import ThinkingStatistics

EVIL = (
    "<img src=x onerror=alert(1)> [click](javascript:alert(1)) | x | `b` \x1b]0;PWNED\x07\x9b31m \u202egnp.exe "
    "![](http://a.b/c.png) **bold** <!-- www.evil.example me@evil.example &lt; $x$\n# Forged heading\n| kept | 99 |"
)


def require_harmless(text: str) -> None:
    """No character that steers a terminal, no HTML, link, image or heading of the evil text's."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert not re.search(r"<(?!!--)\w|(?<!\\)\]\(|(?<!\\)!\[.*(?<!\\)\]\(|https?://|www\.|(?<!\\)\*\*b|<!--", text)
    assert not re.search(r"^#+ Forged|^\| kept \| 99", text, re.MULTILINE)


def test_inline_text_has_no_markup() -> None:
    text = inline(EVIL)
    require_harmless(text)
    assert "\n" not in text and r"\<" not in text
    assert inline("too_short, 12.5% (a-b) snake_case_2") == "too_short, 12.5% (a-b) snake_case_2"
    assert inline("_x_ a*b a|b [1] https://a.b") == r"\_x\_ a\*b a\|b [1] https\://a.b"
    assert inline("<b> & \\") == r"&lt;b&gt; &amp; \\"


@pytest.mark.parametrize(
    ("text", "written"),
    [("doc_1/a:2", "`doc_1/a:2`"), ("a`b", r"a\`b"), ("<b>", "&lt;b&gt;"), ("a\n# b\x1b", r"a \# b\\x1b"), ("", "")],
)
def test_only_plain_names_are_in_code_spans(text: str, written: str) -> None:
    assert code(text) == written


def test_a_table_keeps_its_columns() -> None:
    lines = table(["a|b", "n"], [[EVIL, "1"], ["\\|", "2"]]).splitlines()
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [3] * 4
    require_harmless("\n".join(lines))


def test_terminal_text_has_no_control_and_no_direction_characters() -> None:
    assert shown("a\x1b[31m\r\u202e\u2066b\u200b\x85\u2028") == r"a\x1b[31m\r\u202e\u2066b\u200b\x85\u2028"
    assert shown("é 漢字 👩\u200d🔬 \u0645\u06cc\u200c\u062e") == "é 漢字 👩\u200d🔬 \u0645\u06cc\u200c\u062e"
    assert shown_lines("a\tb\n\x1bc\r\n") == "a\tb\n\\x1bc\\r\n"


def test_rich_and_matplotlib_see_no_markup() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=200)
    console.print(plain("[bold red]a[/] [link=http://evil]b[/link] \x1b[31m"))
    assert "[bold red]a[/] [link=http://evil]b[/link] \\x1b[31m" in console.file.getvalue()  # type: ignore[attr-defined]
    assert plotted("$x\n$") == r"\$x\n\$"


def test_the_report_of_a_corpus_is_harmless() -> None:
    example = {"id": EVIL, "source": EVIL, "row": 1, "text": EVIL, "evidence": {"gram": EVIL, "in": {EVIL: 2}}}
    sets = {EVIL: {"items": 3, "documents": 1}}
    text = Report(1, 2, 1, 1, {EVIL: 1}, sets, {EVIL: [example]}).to_markdown()
    require_harmless(text)
    assert "PWNED" in text


def test_the_card_of_a_data_set_is_harmless() -> None:
    statistics = ThinkingStatistics()
    statistics.rejects[EVIL] += 1
    text = card({"model": EVIL, "inputs": [EVIL]}, statistics, [EVIL])
    require_harmless(re.sub(r"```(json|python).*?\n```\n", "", text, flags=re.DOTALL))
    assert "\x9b" not in text and "\u202e" not in text


def test_the_report_of_a_study_is_harmless(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, [Summary(EVIL, 1000, 0.5, 0.4, 0.6, 2)], f"{EVIL} $\\frac{{$")
    require_harmless((tmp_path / "table.md").read_text(encoding="utf-8"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().out)
    assert (tmp_path / "accuracy.png").stat().st_size > 0
