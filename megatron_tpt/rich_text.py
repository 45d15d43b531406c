"""Untrusted text in what rich and matplotlib draw: its control characters and markup have no effect."""

from rich.markup import escape

from megatron_tpt.names import shown


def plain(text: str) -> str:
    """A text for rich, on one line."""
    return escape(shown(text))


def plotted(text: str) -> str:
    """A text for matplotlib, on one line, in which dollar signs begin no formula."""
    return shown(text).replace("$", r"\$")
