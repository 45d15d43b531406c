"""A page of headings, paragraphs, tables and pictures, as Markdown and as HTML that needs no other file.

All texts are plain: nothing in them is markup (see markdown.py). The page runs no script and loads nothing.
"""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt import markdown
from megatron_tpt.files import atomic_write
from megatron_tpt.names import shown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; display: block; margin: 1rem 0; overflow-x: auto; }
td, th { border: 1px solid #999; padding: .2rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } :root { color-scheme: light dark; }
"""
_SECURITY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Heading:
    """Level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Table:
    """The first column is aligned to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file in the folder of the page."""

    name: str
    text: str


Block = Heading | Table | Picture | str


def write_pages(folder: Path, name: str, blocks: Sequence[Block]) -> None:
    """Write `name`.md and `name`.html."""
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text("\n\n".join(map(_markdown, blocks)) + "\n", encoding="utf-8")
    with atomic_write(folder / f"{name}.html") as temporary:
        temporary.write_text("\n".join(_page(folder, blocks)) + "\n", encoding="utf-8")


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {markdown.inline(text)}"
        case Table(header, rows):
            return markdown.table(header, rows)
        case Picture(name, text):
            return f"![{markdown.inline(text)}]({name})"
        case text:
            return markdown.inline(text)


def _page(folder: Path, blocks: Sequence[Block]) -> Iterator[str]:
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    yield f'<!doctype html><meta charset="utf-8"><title>{_escape(title)}</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_SECURITY}"><style>{_STYLE}</style>'
    for block in blocks:
        match block:
            case Heading(level, text):
                yield f"<h{level}>{_escape(text)}</h{level}>"
            case Table(header, rows):
                yield f"<table>{_row('th', header)}{''.join(_row('td', row) for row in rows)}</table>"
            case Picture(name, text):
                data = base64.b64encode((folder / name).read_bytes()).decode()
                yield f'<p><img alt="{_escape(text)}" src="data:image/png;base64,{data}"></p>'
            case text:
                yield f"<p>{_escape(text)}</p>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _escape(text: str) -> str:
    return html.escape(shown(" ".join(text.split())))
