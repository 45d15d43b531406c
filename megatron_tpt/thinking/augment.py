"""Augmenting: read documents, let a model think about each, write records with the thinking, in shards.

    OUTPUT/augment.json                        the settings, written first; a run with other settings is refused
    OUTPUT/part-00003-00017.jsonl.zst          the records of block 17 (some consecutive rows) of source number 3
    OUTPUT/rejects/part-00003-00017.jsonl.zst  what was rejected in that block, and why
    OUTPUT/README.md                           the data set card; it says so while tasks have not finished
    OUTPUT/.work/{journal,ledger,progress}/    see journal.py, ledger.py, progress.py, status.py
    OUTPUT/.work/finished/task-00003-of-00064  written when the task's share is done
    OUTPUT/.work/{retries,refilter.json}       see retry.py, refilter.py

A shard appears whole or not at all, and changes only as a whole, when its rejects are retried or other filters are
applied. The same command run again after a crash only requests what was not finished. Requests of several blocks are in
flight at once, so that the engine stays full while the last documents of a block finish. A job of several tasks divides
the sources among them, or the blocks where there are fewer sources than tasks; tasks share nothing but the folder.
"""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence

from megatron_tpt.config.cli import as_called
from megatron_tpt.errors import Fault, UserError
from megatron_tpt.jobs.folder import JobFolder
from megatron_tpt.jobs.report import TaskReport
from megatron_tpt.names import counted
from megatron_tpt.records import notes_of_columns_not_kept
from megatron_tpt.thinking.card import write_card
from megatron_tpt.thinking.job import AugmentJob, Generator, plan
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import AugmentProgress, counts
from megatron_tpt.thinking.refilter import end_refilter, refilter
from megatron_tpt.thinking.retry import Retry, check_retry
from megatron_tpt.thinking.settings import check_job
from megatron_tpt.thinking.shards import SETTINGS_NAME, Output
from megatron_tpt.thinking.status import read_status, total_input_bytes
from megatron_tpt.thinking.task import Task

logger = logging.getLogger(__name__)


def augment(options: AugmentOptions) -> AugmentProgress:
    """Do the job that `options` describe, or the one task of it that they name.

    Raises UserError for what the user can fix, before anything is written; Fault where one machine of a job of many
    tasks lacks what the others have.
    """
    job = _checked(options, lambda: _begin(options))
    folder = JobFolder(options.output, SETTINGS_NAME)
    generator = None if folder.settings_path.exists() else job.generator()
    folder.begin(job.settings)
    num_tasks = options.scale.num_tasks
    with folder.task_lock(options.task or 0):
        retry = Retry(job, Output(options.output), options.task or 0)
        if options.retry_rejects:
            generator = generator or _checked(options, job.generator)
            _reopen(job, retry, generator)
        task = Task(job)  # not before: another process may have finished what it had in flight
        blocks = task.blocks()
        first = next(blocks, None)
        if first is None:
            shards = f"{counted(task.progress.shards_skipped, 'shard')} there already"
            logger.info(f"{options.output}: {shards}; nothing to do")
            task.note_progress()
        else:
            task.run(generator or _checked(options, job.generator), itertools.chain([first], blocks))
        task.output.note_finished(task.number, num_tasks)
        if not task.output.unfinished_tasks(num_tasks):
            _write_card(job, task.output)
        retry.end()
    _say(task.progress.reject_report())
    conclude(options)
    return task.progress


def _begin(options: AugmentOptions) -> AugmentJob:
    """Check the options, and whether the folder belongs to such a job."""
    job, output = plan(options), Output(options.output)
    _say(f"note: {note}" for note in options.notes())
    if not options.task:  # the first task says it for all
        _say(f"note: {note}" for note in notes_of_columns_not_kept(job.sources, job.columns))
    check_job(output, job.settings)
    check_retry(options, output)
    return job


def _reopen(job: AugmentJob, retry: Retry, generator: Generator) -> None:
    task = Task(job)
    retry.begin(generator.worker, task.share)
    if task.output.unfinished_tasks(job.options.scale.num_tasks):
        _write_card(job, task.output)  # which says so while it lasts


def apply_filters(options: AugmentOptions) -> AugmentProgress:
    """Apply the filters in `options` to all that the job has generated, see `refilter`."""
    job, output = plan(options), Output(options.output)
    _say(f"note: {note}" for note in options.notes())
    progress = refilter(job, output, lambda: _write_card(job, output, ["other filters are being applied"]))
    _write_card(job, output)
    end_refilter(output)
    _say(progress.reject_report())
    conclude(options)
    return progress


def conclude(options: AugmentOptions) -> None:
    """Where all tasks of a job have finished, say what to do next.

    Raises UserError where not a single document has become a record.
    """
    output = Output(options.output)
    if output.unfinished_tasks(options.scale.num_tasks):
        return
    total, _ = output.totals()
    if not total.records and total.rejects:
        raise UserError(
            f"{output.folder}: the job has finished without a single record: all {total.rejects.total():,} "
            f"documents were rejected ({counts(total.rejects)}; the texts are in {output.rejects}); apply other "
            "--filters with --refilter, or retry with --retry-rejects REASON..., or choose another --output"
        )
    folder = shlex.quote(str(output.folder))
    following = as_called(f"python tools/index.py --input {folder} --tokenizer TOKENIZER_DIR --output PREFIX")
    logger.info(f"{output.folder}: {counted(total.records, 'record')}. Next: {following}")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        logger.info(line)


def _checked[T](options: AugmentOptions, check: Callable[[], T]) -> T:
    """What `check` returns. What is wrong now in a task, and was right when the job began, is a problem of this machine

    (a missing file system, for example): a Fault, which stops no other task."""
    try:
        return check()
    except UserError as error:
        if options.task is None or not (options.output / SETTINGS_NAME).exists():
            raise
        raise Fault(f"{error} (when the job began this was right)") from error


def launch(options: AugmentOptions, command: Sequence[str]) -> TaskReport:
    """Run `command`, whose options these are, as the tasks that it is split into.

    Raises UserError for what the user can fix, before anything is started.
    """
    job = _begin(options)
    job.generator()
    output = Output(options.output)
    output.begin(job.settings)
    num_tasks = options.scale.num_tasks
    if options.retry_rejects:  # the result of the round is known when all of them have finished it
        for task in range(num_tasks):
            output.note_reopened(task, num_tasks)
    input_bytes = total_input_bytes(job.sources)
    report = output.launch(command, options.scale, lambda: read_status(output, num_tasks, input_bytes).line())
    _write_card(job, output)
    return report


def _write_card(job: AugmentJob, output: Output, missing: Sequence[str] = ()) -> None:
    total, num_gone = output.totals()
    unfinished = output.unfinished_tasks(job.options.scale.num_tasks)
    missing = list(missing)
    if unfinished:
        missing.append(f"{len(unfinished):,} of {counted(job.options.scale.num_tasks, 'task')} not finished")
    missing += [f"{counted(num_gone, 'finished shard')} missing or damaged"] if num_gone else []
    write_card(output.folder, job.settings, total, missing)
