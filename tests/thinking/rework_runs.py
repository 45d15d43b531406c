"""Jobs with rejects of several kinds, and runs that are killed at a certain system call."""

import dataclasses
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from augment_runs import NO_FILTERS, job, records, rejects
from unruly_server import UnrulyServer

from megatron_tpt.records import read_records, write_records
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.shards import read_rejects

FILTERS = dataclasses.replace(NO_FILTERS, min_words=5)
SHORT = "just few words"
NUM_GOOD = 7


def mixed_job(folder: Path, server: UnrulyServer, **changes: Any) -> AugmentOptions:
    """A job over 13 rows in three blocks: good ones, a duplicate, a blank one, two that are refused, two of which the
    thought is too short."""
    server.reasoning = None
    texts = [f"ok 0 {i}" for i in range(NUM_GOOD)]
    texts[2:2] = ["400 1 refused", "ok 0 short"]
    texts += ["ok 0 0", " ", "400 1 last", "ok 0 brief"]
    server.answers = {"ok 0 short": SHORT, "ok 0 brief": SHORT}
    return job(folder, server, texts, **{"filters": FILTERS, "rows_per_shard": 5} | changes)


def state(output: Path) -> tuple[list[tuple[str, str | None]], list[tuple[int, str]]]:
    """The records in order, and the rejects by row and reason."""
    done = [(record.text, record.thinking) for record in records(output)]
    return done, sorted((reject["row"], reject["reason"]) for reject in rejects(output))


def killed_at(call: int, run: Callable[[], Any], tmp: Path) -> bool:
    """Run in a process of its own that ends, as by kill -9, before its system call number `call` of those that change
    files. Returns whether it came so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child uses its own alone
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    signal.alarm(60)
    number = 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            number += 1
            if number == call:
                os._exit(9)
            return function(*arguments, **options)

        return counted

    for name in ("replace", "rename", "unlink", "write", "fsync", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))
    try:
        run()
    except BaseException as error:
        (tmp / "child-error").write_text(repr(error))
        os._exit(3)
    os._exit(0)


def as_earlier_version(output: Path) -> None:
    """Take away what earlier versions did not write: lengths of rejects and of chunks, revisions of blocks,
    sizes of files."""
    shutil.rmtree(output / ".inventory")
    for path in output.glob("part-*"):
        whole = list(read_records([path]))
        for record in whole:
            for chunk in record.meta.get("chunks", []):
                del chunk["thinking_tokens"]
        write_records(path, whole)
    for path in (output / "rejects").glob("part-*"):
        lines = [{key: value for key, value in reject.items() if key != "generation"} for reject in read_rejects(path)]
        path.write_bytes(zstandard.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
    for path in (output / ".work" / "ledger").iterdir():
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "revision"}) + "\n" for e in entries))
