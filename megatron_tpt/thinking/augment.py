"""Augmenting: read documents, let a model think about each, write records with the thinking, in shards.

    OUTPUT/augment.json                       the settings, written first; a run with other settings is refused
    OUTPUT/part-00003-00017.jsonl.zst         the records of block 17 (some consecutive rows) of source number 3
    OUTPUT/rejects/part-00003-00017.jsonl.zst what came to nothing in that block, and why
    OUTPUT/README.md                          the data set card, when all is done
    OUTPUT/journal/, ledger/, progress/, logs/   see journal.py, ledger.py, progress.py

A shard appears whole or not at all, and never changes. The same command run again after a crash asks only for what was
not finished. Requests of several blocks are under way at once, so that the engine stays full while the last documents of
a block finish. A job of several tasks divides the sources among them, or the blocks where there are fewer sources than
tasks; tasks share nothing but the folder.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Completion,
    Engine,
    Failure,
    Request,
    Sampling,
    check_context,
    check_model,
    load_tokenizer,
    open_engine,
)
from megatron_tpt.records import Columns, Row, Source, expand_sources, read_blocks, read_records, write_lines, write_records
from megatron_tpt.records import Record
from megatron_tpt.scale import task_lock
from megatron_tpt.thinking.card import write_card
from megatron_tpt.thinking.journal import Journal, Line, path_of
from megatron_tpt.thinking.ledger import Entry, IdSet, Ledger, read_entries
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import Progress, Reporter
from megatron_tpt.thinking.prompts import Documents, Prompt, Template, load_template
from megatron_tpt.thinking.rows import OpenRow, RowWorker, id_digest, make_reject
from megatron_tpt.thinking.settings import check_output, make_settings, write_settings
from megatron_tpt.thinking.statistics import ThinkingStatistics
from megatron_tpt.thinking.thoughts import ThoughtReader

_SUFFIX = ".jsonl.zst"
# So many bad rows and no good one at the start of the input are a wrong column name, not bad luck.
_MAX_BAD_AT_START = 100


def augment(options: AugmentOptions) -> Progress:
    """Do one task of the job `options` describe, or all of it where it has one task.

    Raises UserError for what the user can mend, before anything is written.
    """
    job = check_job(options)
    with task_lock(options.output / "locks", options.task or 0) if options.output.exists() else _no_lock():
        ...


class Job(NamedTuple):
    """What `options` come to, checked."""

    options: AugmentOptions
    sources: list[Source]
    columns: Columns
    template: Template
    settings: dict[str, Any]
