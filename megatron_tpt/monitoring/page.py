"""Runs and jobs on one page of a terminal."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tpt.jobs.folder import count_states
from megatron_tpt.monitoring.state import Status
from megatron_tpt.names import shown
from megatron_tpt.units import duration

_TABLE_WIDTH = 130
"""Columns of a terminal that a table needs."""
_COLORS = {"running": "green", "starting": "cyan", "silent": "red", "failed": "red", "stopped": "yellow"}


def page(statuses: Sequence[Status], width: int) -> RenderableType:
    """All of them for a terminal of `width` columns, and their warnings below: a table, or two lines for each where the
    terminal is too narrow for one."""
    overview = [_table(statuses)] if width >= _TABLE_WIDTH else [line for status in statuses for line in _lines(status)]
    warnings = [
        Text.assemble((f"{_name(status)}: ", "bold"), (shown(warning), "yellow"))
        for status in statuses
        for warning in status.warnings
    ]
    return Group(*overview, *warnings)


def _table(statuses: Sequence[Status]) -> Table:
    rows = [_cells(status) for status in statuses]
    table = Table("", "state", *rows[0], box=box.SIMPLE_HEAD)
    table.columns[0].overflow = "fold"  # a name is shown whole
    for column in table.columns[1:]:
        column.no_wrap = True
    for column in table.columns[3:]:
        column.justify = "right"
    for status, cells in zip(statuses, rows, strict=True):
        table.add_row(Text(_name(status)), _state(status), *map(Text, cells.values()))
    return table


def _lines(status: Status) -> list[Text]:
    done, *cells = _cells(status).items()
    known = ", ".join(f"{name} {cell}" for name, cell in cells if cell)
    first = Text.assemble((_name(status), "bold"), "  ", _state(status), f"  {done[1]}")
    return [first, Text(f"    {known}")] if known else [first]


def _name(status: Status) -> str:
    return shown(str(status.folder))


def _state(status: Status) -> Text:
    return Text(status.state, style=_COLORS.get(status.state, ""))


def _cells(status: Status) -> dict[str, str]:
    """What is known besides the state, by the names of the columns; empty where it is not known."""
    checkpoint = ""
    if status.checkpoint_step is not None and status.checkpoint_age_s is not None:
        checkpoint = f"{status.checkpoint_step:,} ({duration(status.checkpoint_age_s)} ago)"
    return {
        "done": _done(status),
        "loss": _loss(status, "loss"),
        "validation": _loss(status, "validation_loss"),
        "tokens/s": f"{status.tokens_per_s:,.0f}" if status.tokens_per_s is not None else "",
        "MFU": f"{status.mfu:.1%}" if status.mfu is not None else "",
        "left": duration(status.remaining_s) if status.remaining_s is not None else "",
        "checkpoint": checkpoint,
        "heartbeat": f"{duration(status.heartbeat_age_s)} ago" if status.heartbeat_age_s is not None else "",
    }


def _done(status: Status) -> str:
    """As in "1,200/25,000 steps, 4%" or "37%, tasks: 3 running, 1 finished"."""
    parts = []
    if status.step is not None:
        parts.append(f"{status.step:,}/{status.num_steps:,} steps" if status.num_steps else f"step {status.step:,}")
    if status.share is not None:
        parts.append(f"{math.floor(100 * status.share)}%")
    if status.tasks:
        parts.append("tasks: " + count_states([state for state, number in status.tasks.items() for _ in range(number)]))
    return ", ".join(parts)


def _loss(status: Status, name: str) -> str:
    if name not in status.losses:
        return ""
    loss = status.losses[name]
    return f"{loss:.4f}" if loss is not None else "not finite"
