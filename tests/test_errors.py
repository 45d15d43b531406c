"""What the user has to fix is distinguished from what the disk or the network did: only the first stops all tasks of a
job."""

import errno
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tpt.config.cli import run
from megatron_tpt.errors import Fault, UserError, failure
from megatron_tpt.generation import EngineError
from megatron_tpt.records import Columns, expand_sources, read_blocks

ASK_HUB = """
import time
time.sleep = lambda seconds: None  # the Hub's library waits for a minute between its attempts

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.records import expand_sources

for owner in ("busy", "broken", "nobody"):
    for ask in (lambda: load_tokenizer(f"{owner}/name"), lambda: expand_sources([f"hf://{owner}/name"])):
        try:
            ask()
        except (UserError, Fault) as error:
            assert len(str(error).splitlines()) == 1
            print(owner, type(error).__name__)
"""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_a_disk_that_fails_is_no_mistake_of_the_user(number: int) -> None:
    assert isinstance(failure("x", OSError(number, os.strerror(number))), Fault)


def test_too_many_open_files_are_the_users_to_allow() -> None:
    error = failure("x", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert isinstance(error, UserError) and "ulimit -n" in str(error)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_a_name_that_is_wrong_is(number: int) -> None:
    error = ValueError("not a model")
    error.__cause__ = OSError(number, os.strerror(number))
    assert isinstance(failure("x", error), UserError)
    assert isinstance(failure("x", ValueError("not a model")), UserError)


def test_a_file_whose_disk_fails_while_it_is_read_is_a_fault_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.symlink_to("/proc/self/mem")  # reading its first page is an I/O error
    with pytest.raises(Fault, match=r"x\.jsonl: cannot be read \(Input/output error\)"):
        (source,) = expand_sources([path])
        list(read_blocks(source, Columns(), 10, lambda block: True))


def test_an_engine_that_fails_ends_its_task_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise EngineError("vLLM server 3 ended with code 1: uncorrectable ECC error")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1  # 2 would keep all other tasks from starting
    assert capsys.readouterr().err == "error: vLLM server 3 ended with code 1: uncorrectable ECC error\n"


@pytest.fixture
def hub() -> Iterator[str]:
    """A server that answers as the Hub does when it is asked too much, broken, or for what it does not have."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = 404, "RepoNotFound"
            for owner, its_status in (("busy", 429), ("broken", 500)):
                if owner in self.path:
                    status, code = its_status, ""
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_that_is_busy_or_broken_is_a_fault_and_a_name_that_it_does_not_know_a_mistake(
    hub: str, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", ASK_HUB], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["busy Fault"] * 2 + ["broken Fault"] * 2 + ["nobody UserError"] * 2
