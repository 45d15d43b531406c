"""Pages for browsers, made of untrusted text: it shows as it is, and nothing in it is markup.

A page needs no network and runs no script, and forbids both.
"""

import html
from collections.abc import Iterable, Iterator, Sequence

from megatron_tpt.names import shown_lines

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def as_text(text: str) -> str:
    """A text in HTML, with control characters shown as escapes."""
    return html.escape(shown_lines(text), quote=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table of plain texts, in pieces."""
    yield "<table>\n<tr>" + "".join(f"<th>{as_text(cell)}</th>" for cell in header) + "</tr>\n"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{as_text(cell)}</td>" for cell in row) + "</tr>\n"
    yield "</table>\n"


def page(title: str, style: str, body: Iterable[str]) -> Iterator[str]:
    """A whole page, in pieces: its title, which is a plain text and also the heading, its CSS, and the HTML below."""
    yield "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
    yield '<meta name=viewport content="width=device-width, initial-scale=1">\n'
    yield f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">\n'
    yield f"<title>{as_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{as_text(title)}</h1>\n"
    yield from body
    yield "</body>\n</html>\n"
