"""A job of a few lines, an example of how to extend the program: how many words each document has.

    OUTPUT/word_counts.json                the settings; see jobs/folder.py for what else is there
    OUTPUT/words-00003-00017.jsonl.zst     {"id": ..., "words": ...} of the documents of block 17 of source 3

A file appears whole or not at all: after kill -9 the same command writes those that are missing.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_tpt.config.fields import FLAT
from megatron_tpt.errors import UserError
from megatron_tpt.jobs.folder import JobFolder, Share
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.jobs.progress import Progress, Reporter, share_and_eta
from megatron_tpt.jobs.settings import describe_inputs
from megatron_tpt.records import Columns, ReadProgress, Source, describe, json_lines, read_blocks


@dataclass(frozen=True)
class WordCountOptions:
    """Whose words to count, and where to."""

    input: list[str]
    """Files of records, folders of them, or patterns."""
    output: Path
    """The folder for the counts."""
    text_column: str = "text"
    """The column with the document."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """Stop at a record without usable text, or skip it and count it."""
    records_per_file: int = 10_000
    """Documents whose counts are in one file."""
    scale: Annotated[ScaleOptions, FLAT] = field(default_factory=ScaleOptions)
    task: int | None = None
    """Do this task alone; set by --executor and --num-tasks."""


@dataclass
class WordCountProgress(Progress):
    """What one task has counted."""

    records: int = 0
    bad_records: int = 0

    def summary(self) -> str:
        share = share_and_eta(self.input_bytes_done, self.input_bytes, 0)
        return f"{self.records:,} records, {self.bad_records:,} bad records skipped{share}"


def count_words(options: WordCountOptions, command: list[str]) -> int:
    """Do the job, or the one task that `options` name; returns the exit code. `command` is what tasks are started by.

    Raises UserError for what the user can fix, such as other settings than those of the job in the folder.
    """
    job = JobFolder(options.output, "word_counts.json")
    sources = job.sources(options.input)
    job.begin(
        {
            "input": describe_inputs(job.settings_path, sources),
            "text_column": options.text_column,
            "on_bad_record": options.on_bad_record,
            "records_per_file": options.records_per_file,
        }
    )
    if options.task is None and options.scale.is_split:
        return job.launch(command, options.scale).exit_code
    task, num_tasks = options.task or 0, options.scale.num_tasks
    share = Share(task, num_tasks, len(sources))
    progress = WordCountProgress(sum(source.num_bytes or 0 for _, source in share.of(sources)))
    with job.task_lock(task), Reporter(progress, job.progress_path(task, num_tasks)) as reporter:
        for number, source in share.of(sources):
            _count(options, number, source, share, reporter, progress)
        job.note_finished(task, num_tasks)
    return 0


def _count(
    options: WordCountOptions,
    number: int,
    source: Source,
    share: Share,
    reporter: Reporter,
    progress: WordCountProgress,
) -> None:
    def path(block: int) -> Path:
        return options.output / f"words-{number:05d}-{block:05d}.jsonl.zst"

    def is_missing(block: int) -> bool:
        return share.owns(number, block) and not path(block).exists()

    begin, read = progress.input_bytes_done, ReadProgress()
    columns = Columns(options.text_column)
    for block, rows in read_blocks(source, columns, options.records_per_file, is_missing, read):
        with json_lines(path(block)) as add:
            for row in rows:
                if row.record is not None:
                    add(json.dumps({"id": row.record.id, "words": len(row.record.text.split())}).encode())
                    progress.records += 1
                elif options.on_bad_record == "skip":
                    progress.bad_records += 1
                else:
                    raise UserError(describe(source, row))
                progress.input_bytes_done = begin + read.num_bytes
                reporter.show()
    progress.input_bytes_done = begin + (source.num_bytes or 0)
