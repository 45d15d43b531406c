"""How far a whole job is, read from its folder: by whoever wants to know, on any machine that sees the folder.

The states of tasks are explained in jobs/folder.py.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.folder import TaskState, count_states
from megatron_tpt.jobs.progress import share_and_eta
from megatron_tpt.jobs.report import TaskFiles
from megatron_tpt.records import Source, expand_sources
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.progress import AugmentProgress, read_progress, reject_lines
from megatron_tpt.thinking.shards import Output

_MAX_FAILURES = 5


@dataclass
class Status:
    """What the tasks of a job have done together."""

    folder: Path
    states: list[TaskState]
    """By task."""
    input_bytes: int
    """Size of the input, if known."""
    logs: Path
    records: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    chunk_rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """A reject of every reason, in words."""
    input_bytes_done: int = 0
    bytes_per_s: float = 0.0
    """Of the tasks that are running, as are the speeds below."""
    prompt_tokens_per_s: float = 0.0
    thinking_tokens_per_s: float = 0.0

    def add(self, progress: AugmentProgress, *, is_running: bool) -> None:
        """Add what one task reports."""
        self.records += progress.records_before + progress.records
        self.rejects.update(progress.rejects_before + progress.rejects)
        self.chunk_rejects.update(progress.chunk_rejects_before + progress.chunk_rejects)
        self.examples = progress.examples | self.examples
        self.input_bytes_done += progress.input_bytes_done
        if is_running and progress.generation_s:
            self.bytes_per_s += progress.bytes_per_s
            self.prompt_tokens_per_s += progress.prompt_tokens / progress.generation_s
            self.thinking_tokens_per_s += progress.thinking_tokens / progress.generation_s

    def line(self) -> str:
        """All in one line."""
        judged = self.records + self.rejects.total()
        accepted = f" ({self.records / judged:.1%} accepted)" if judged else ""
        speed = f"{self.prompt_tokens_per_s:,.0f} tokens/s in, {self.thinking_tokens_per_s:,.0f} out"
        left = share_and_eta(self.input_bytes_done, self.input_bytes, self.bytes_per_s)
        return f"{self.records:,} records{accepted}; {speed}{left}; tasks: {count_states(self.states)}"

    def screen(self) -> str:
        """Some lines, with reasons of rejects and failures."""
        lines = [f"{self.folder}: {self.line()}"]
        judged = self.records + self.rejects.total()
        lines += [f"  {line}" for line in reject_lines(self.rejects, self.chunk_rejects, judged, self.examples)]
        if Output(self.folder).refilter_mark.exists():
            lines.append("  other filters are being applied, or that was interrupted: then run --refilter to its end")
        if self.rejects and not self.records and set(self.states) == {"finished"}:
            lines.append("  finished without a single record: --refilter or --retry-rejects may still use the rejects")
        failed = [task for task, state in enumerate(self.states) if state == "failed"]
        for task in failed[:_MAX_FAILURES]:
            files = TaskFiles(self.logs, task)
            lines.append(f"  task {task} failed with exit code {files.read_exit_code()}: {files.user_error()}")
        if len(failed) > _MAX_FAILURES:
            lines.append(f"  ... and {len(failed) - _MAX_FAILURES} more; logs in {self.logs}")
        return "\n".join(lines)


def status(options: AugmentOptions) -> Status:
    """How far the job is that `options` describe. Raises UserError when its folder holds none."""
    output = Output(options.output)
    if not output.settings_path.exists():
        raise UserError(f"{options.output}: no job was begun here; give the same command as for the job, and --status")
    num_tasks = options.scale.num_tasks if options.scale.num_tasks > 1 else output.latest_split()
    sources = expand_sources(options.input) if options.limit is None else []
    return read_status(output, num_tasks, total_input_bytes(sources))


def read_status(output: Output, num_tasks: int, input_bytes: int) -> Status:
    """How far the job in `output` is as one of `num_tasks` tasks."""
    result = Status(output.folder, output.states(num_tasks), input_bytes, output.logs)
    for task, state in enumerate(result.states):
        if (progress := read_progress(output.progress_path(task, num_tasks))) is not None:
            result.add(progress, is_running=state == "running")
    return result


def total_input_bytes(sources: list[Source]) -> int:
    """The size of an input, if known."""
    return sum(source.num_bytes or 0 for source in sources)
