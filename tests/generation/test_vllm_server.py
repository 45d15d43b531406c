"""Real vLLM servers, started and watched by the engine."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running_servers import newest_server
from tiny_models import CHAT_TEMPLATE, CORPUS, make_model, unchanged_environment

from megatron_tpt.generation import (
    Completion,
    Engine,
    EngineError,
    EngineOptions,
    Failure,
    Request,
    Sampling,
    complete,
    open_engine,
)

pytestmark = pytest.mark.slow(minutes=2)
PROMPTS = [f"{text} {i}" for i in range(4) for text in CORPUS]
GREEDY = Sampling(temperature=0, max_new_tokens=24)
HOT = Sampling(temperature=1.5, top_p=0.9, max_new_tokens=60, seed=3, stop=("</think>", "f"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE)


def server_options(model: str, log_dir: Path, **changes: Any) -> EngineOptions:
    return EngineOptions(model, 256, max_num_seqs=4, kind="vllm-server", log_dir=log_dir, **changes)


@pytest.fixture(scope="module")
def engine(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(server_options(model, tmp_path_factory.mktemp("logs"))) as engine:
        yield engine


def test_a_server_completes_as_vllm_in_this_process(model: str, engine: Engine) -> None:
    ids = [[5, 6, 7 + i] for i in range(4)]
    with unchanged_environment(), open_engine(EngineOptions(model, 256, max_num_seqs=4)) as own:
        for prompts, sampling in ((PROMPTS, GREEDY), (PROMPTS, HOT), (ids, HOT)):
            theirs, ours = complete(engine, prompts, sampling), complete(own, prompts, sampling)
            assert [c.token_ids for c in theirs] == [c.token_ids for c in ours]
            # Where a tag ends a completion in the middle of a character, the server shows the part of it.
            assert [c.text.rstrip("\ufffd") for c in theirs] == [c.text.rstrip("\ufffd") for c in ours]


def test_counts_are_the_servers_own(engine: Engine) -> None:
    before = engine.stats()
    completions = complete(engine, PROMPTS, GREEDY)
    stats = engine.stats()
    assert stats.num_finished - before.num_finished == len(PROMPTS)
    assert stats.completion_tokens - before.completion_tokens == sum(len(c.token_ids) for c in completions)


def test_a_prompt_that_is_too_long_fails_alone(engine: Engine) -> None:
    requests = [Request([5] * length, GREEDY, key=length) for length in (10, 256, 300)]
    done = {request.key: outcome for request, outcome in engine.generate(requests)}
    assert isinstance(done[10], Completion)
    assert all(isinstance(done[length], Failure) for length in (256, 300))
    assert {done[256].reason, done[300].reason} == {"prompt_too_long"}  # type: ignore[union-attr]


def test_leaving_early_abandons_the_rest(engine: Engine) -> None:
    for _ in engine.generate(Request(prompt, GREEDY) for prompt in PROMPTS):
        break
    assert len(complete(engine, PROMPTS[:2], GREEDY)) == 2


@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_server_that_fails_is_started_again_and_nothing_is_lost(
    model: str, tmp_path: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=200)
    with open_engine(server_options(model, tmp_path / "logs", hang_timeout_s=20)) as engine:
        expected = complete(engine, PROMPTS, sampling)
        server = newest_server()
        family = [server, *server.children(recursive=True)]
        [engine_core] = [process for process in family if "EngineCore" in process.name()]
        done = {}
        for request, outcome in engine.generate(Request(p, sampling, key=i) for i, p in enumerate(PROMPTS)):
            if not done:
                if fault == "killed":
                    os.kill(server.pid, signal.SIGKILL)
                else:
                    os.kill(engine_core.pid, signal.SIGSTOP)  # the server itself answers as before
            assert request.key not in done
            done[request.key] = outcome
        assert [done[i] for i in range(len(PROMPTS))] == expected
        assert engine.stats().num_retried > 0
        assert ("has written no token for 20 s" in capfd.readouterr().err) == (fault == "hangs")
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive


def test_a_server_that_dies_at_its_start_says_why(model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with (
        pytest.raises(EngineError, match=r"ended with code 1 before it could be asked: .*NoSuchForCausalLM"),
        open_engine(server_options(str(folder), tmp_path / "logs")),
    ):
        pass
