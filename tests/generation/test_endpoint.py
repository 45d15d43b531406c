"""The endpoint engine against real HTTP servers that misbehave."""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from unruly_server import KEY, MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
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

SAMPLING = Sampling(max_new_tokens=7, stop=("END",), seed=(1 << 62) + 5)


def options(*servers: UnrulyServer, **changes: Any) -> EngineOptions:
    quick: dict[str, Any] = {"request_timeout_s": 1.0, "max_retries": 2, "endpoint_patience_s": 60.0}
    return EngineOptions(MODEL, kind="endpoint", endpoints=tuple(server.url for server in servers), **quick | changes)


def ask(engine: Engine, prompts: list[str]) -> dict[str, Completion | Failure]:
    """The outcome of every prompt; each comes back once."""
    outcomes = [
        (request.prompt, outcome) for request, outcome in engine.generate(Request(p, SAMPLING) for p in prompts)
    ]
    assert sorted(prompt for prompt, _ in outcomes) == sorted(prompts)  # type: ignore[type-var]
    return dict(outcomes)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as server:
        yield server


FAULTS = [
    "500",
    "502",
    "503",
    "408",
    "409",
    "425",
    "429",
    "hang",
    "cut",
    "garbage",
    "nochoices",
    "notext",
    "unfinished",
]


def test_every_request_ends_once_whatever_the_servers_do(server: UnrulyServer) -> None:
    prompts = [f"{fault} 1 {i}" for fault in FAULTS for i in range(2)]
    prompts += [f"ok 0 {i}" for i in range(50)] + ["400 9 a", "422 9 b", "long 9 c", "filtered 9 d", "big 9 e"]
    with unruly_server() as other, open_engine(options(server, other, max_num_seqs=8, max_retries=5)) as engine:
        outcomes = ask(engine, prompts)
        stats = engine.stats()
    reasons = {prompt: outcome.reason for prompt, outcome in outcomes.items() if isinstance(outcome, Failure)}
    assert reasons == {
        "400 9 a": "bad_request",
        "422 9 b": "bad_request",
        "long 9 c": "prompt_too_long",
        "filtered 9 d": "content_filter",
        "big 9 e": "prompt_too_long",
    }
    assert all(o.text == f"answer to {p}" for p, o in outcomes.items() if isinstance(o, Completion))
    assert (stats.num_finished, stats.num_failed) == (len(prompts) - 5, 5)
    assert stats.num_retried >= 2 * len(FAULTS)
    assert stats.num_sent == len(prompts) + stats.num_retried
    assert (stats.prompt_tokens, stats.completion_tokens) == (3 * stats.num_finished, 5 * stats.num_finished)
    assert server.bodies and other.bodies


@pytest.mark.parametrize(
    "fault,reason",
    [("500", "server_error"), ("hang", "timeout"), ("cut", "connection"), ("garbage", "invalid_response")],
)
def test_a_request_that_always_fails_fails_and_the_others_continue(
    server: UnrulyServer, fault: str, reason: str
) -> None:
    # The bad one is the last to finish: no other shows by then that the server works.
    with open_engine(options(server)) as engine:
        outcomes = ask(engine, [f"{fault} 99 bad", *(f"ok 0 {i}" for i in range(20))])
    bad = outcomes.pop(f"{fault} 99 bad")
    assert isinstance(bad, Failure) and bad.reason == reason
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert sum(body["prompt"] == f"{fault} 99 bad" for body in server.bodies) == 3  # once, and two retries


def test_retry_after_is_obeyed(server: UnrulyServer) -> None:
    with open_engine(options(server)) as engine:
        outcomes = ask(engine, ["429 3 a"])
    assert isinstance(outcomes["429 3 a"], Completion)
    assert len(server.bodies) == 4


def test_an_overloaded_server_is_waited_for(server: UnrulyServer) -> None:
    with open_engine(options(server, max_retries=0)) as engine:
        server.status = 503
        threading.Timer(1.5, lambda: setattr(server, "status", None)).start()
        assert all(isinstance(outcome, Completion) for outcome in ask(engine, ["ok 0 a", "ok 0 b"]).values())


def test_what_is_refused_for_long_while_others_are_answered_is_waited_for(server: UnrulyServer) -> None:
    with open_engine(options(server, max_retries=0, max_num_seqs=2, endpoint_patience_s=1.5)) as engine:
        outcomes = ask(engine, ["429 8 a", *(f"ok 0 {i}" for i in range(60))])  # eight times 0.2 s and more
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())


def test_an_outage_after_a_first_failure_is_no_fault_of_the_request(server: UnrulyServer) -> None:
    def fix() -> None:
        num_asked = len(server.headers)
        while len(server.headers) < num_asked + 6:
            time.sleep(0.01)
        server.status = None

    requests = (Request(prompt, SAMPLING) for prompt in ["500 1 a", *(f"ok 0 {i}" for i in range(30))])
    outcomes = []
    with open_engine(options(server, max_retries=1, max_num_seqs=2)) as engine:
        for _, outcome in engine.generate(requests):
            outcomes.append(outcome)
            if len(outcomes) == 1:  # the first request has failed once by now, and for a while everything does
                server.status = 500
                threading.Thread(target=fix, daemon=True).start()
    assert len(outcomes) == 31
    assert all(isinstance(outcome, Completion) for outcome in outcomes)


def test_a_server_that_dies_leaves_its_requests_to_the_others(server: UnrulyServer) -> None:
    with unruly_server() as other, open_engine(options(server, other, max_num_seqs=2)) as engine:
        server.delay_s = other.delay_s = 0.05
        prompts = [f"ok 0 {i}" for i in range(60)]
        outcomes = {}
        for request, outcome in engine.generate(Request(prompt, SAMPLING) for prompt in prompts):
            outcomes[request.prompt] = outcome
            if len(outcomes) == 10:
                other.stop()
            if len(outcomes) == 30:
                other.start()
        assert all(isinstance(outcomes[prompt], Completion) for prompt in prompts)


def test_an_outage_ends_the_run_and_not_the_requests(server: UnrulyServer) -> None:
    with open_engine(options(server, endpoint_patience_s=1.0)) as engine:
        assert len(ask(engine, ["ok 0 a", "ok 0 b"])) == 2
        server.stop()
        with pytest.raises(
            EngineError, match=r"no endpoint has answered for .* s; the last error: http://127.* reached"
        ):
            ask(engine, [f"ok 0 {i}" for i in range(100)])
        server.start()


def test_a_server_that_only_fails_ends_the_run_too(server: UnrulyServer) -> None:
    with open_engine(options(server, endpoint_patience_s=1.0)) as engine:
        server.status = 500
        with pytest.raises(EngineError, match="500"):
            ask(engine, [f"ok 0 {i}" for i in range(100)])
        with pytest.raises(EngineError, match="500"):
            ask(engine, ["ok 0 a"])


def test_no_server_at_start_is_an_error(server: UnrulyServer) -> None:
    with (
        pytest.raises(EngineError, match="cannot be reached"),
        open_engine(EngineOptions(MODEL, kind="endpoint", endpoints=("http://127.0.0.1:9/v1",), endpoint_patience_s=1)),
    ):
        pass


@pytest.mark.parametrize(
    "status,advice", [(401, "api-key-env"), (403, "api-key-env"), (404, "/v1"), (302, "final URL")]
)
def test_what_no_request_can_mend_ends_the_run_at_once(server: UnrulyServer, status: int, advice: str) -> None:
    with open_engine(options(server, endpoint_patience_s=600)) as engine:
        server.status = status
        with pytest.raises(UserError, match=rf"{server.url}/completions answered {status}.*{advice}"):
            ask(engine, [f"ok 0 {i}" for i in range(100)])
    with pytest.raises(UserError, match=rf"/models answered {status}"), open_engine(options(server)):
        pass


def test_another_model_is_named(server: UnrulyServer) -> None:
    server.models = ("other",)
    with pytest.raises(UserError, match=r"lists one model, 'other', and not 'unruly'"), open_engine(options(server)):
        pass


def test_a_server_whose_context_the_new_tokens_fill_is_named(server: UnrulyServer) -> None:
    server.context = SAMPLING.max_new_tokens
    message = rf"{server.url}: its context is 7 tokens.*lower --max-new-tokens"
    with open_engine(options(server)) as engine, pytest.raises(UserError, match=message):
        ask(engine, ["ok 0"])
    assert not server.bodies
    server.context = SAMPLING.max_new_tokens + 1
    with open_engine(options(server)) as engine:
        ask(engine, ["ok 0"])
    assert len(server.bodies) == 1


def test_requests_are_taken_as_places_become_free(server: UnrulyServer) -> None:
    server.delay_s = 0.01
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for i in range(40):
            taken += 1
            yield Request(f"ok 0 {i}", SAMPLING)

    with open_engine(options(server, max_num_seqs=4)) as engine:
        for done, _ in enumerate(engine.generate(requests()), start=1):
            assert taken - done <= 4
    assert taken == 40
    assert server.max_in_flight == 4


def test_leaving_early_abandons_the_rest(server: UnrulyServer) -> None:
    with open_engine(options(server, max_num_seqs=4)) as engine:
        for _ in engine.generate(Request(f"hang {i} {i}", SAMPLING) for i in range(4)):
            break
        assert list(ask(engine, ["ok 0 a"])) == ["ok 0 a"]


def test_an_error_of_the_source_reaches_the_caller(server: UnrulyServer) -> None:
    def requests() -> Iterator[Request]:
        yield Request("ok 0 a", SAMPLING)
        raise ZeroDivisionError

    with open_engine(options(server)) as engine, pytest.raises(ZeroDivisionError):
        list(engine.generate(requests()))


def test_strict_servers_are_asked_nothing_that_only_vllm_knows(server: UnrulyServer) -> None:
    with open_engine(options(server)) as engine:
        ask(engine, ["ok 0 a"])
    assert server.bodies == [
        {
            "model": MODEL,
            "prompt": "ok 0 a",
            "max_tokens": 7,
            "temperature": 0.6,
            "top_p": 0.9,
            "stop": ["END"],
            "seed": 5,  # 31 bits
        }
    ]


def test_vllm_is_recognized_by_its_name(server: UnrulyServer) -> None:
    server.owner = "vllm"
    with open_engine(options(server)) as engine:
        complete(engine, [[1, 2]], SAMPLING)
    [body] = server.bodies
    assert body["prompt"] == [1, 2]
    assert body["return_token_ids"] and body["skip_special_tokens"] is False
    assert body["seed"] > 1 << 53


def test_chats_are_asked_as_chats(server: UnrulyServer) -> None:
    message = {"role": "user", "content": "ok 0 a"}
    with open_engine(options(server, api="chat")) as engine:
        [completion] = complete(engine, [[message]], SAMPLING)
        assert (completion.text, completion.reasoning) == ("answer to ok 0 a", "hm")
        assert server.paths == ["/v1/chat/completions"]
        assert server.bodies[0]["messages"] == [message]
        with pytest.raises(UserError, match="--api completions"):
            complete(engine, ["text"], SAMPLING)
    with open_engine(options(server)) as engine, pytest.raises(UserError, match="--api chat"):
        complete(engine, [[message]], SAMPLING)


def test_missing_usage_is_reported_once(server: UnrulyServer) -> None:
    server.usage = False
    with open_engine(options(server)) as engine, pytest.warns(UserWarning, match="how many tokens") as reported:
        completions = complete(engine, ["ok 0 a", "ok 0 b"], SAMPLING)
    assert [completion.num_tokens for completion in completions] == [0, 0]
    assert len(reported) == 1


def test_the_key_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said: list[object] = []
    with unruly_server(key=KEY) as server:
        own = options(server, api_key_env="MY_KEY")
        with open_engine(own) as engine:
            said += [own, asdict(own), engine, vars(engine), engine.stats()]
            said += ask(engine, ["ok 0 a", "400 9 b", "500 99 c", "hang 99 d"]).values()
        for status in (401, 404, 500):  # the server repeats the key in its answers
            with open_engine(replace(own, endpoint_patience_s=0.5)) as engine:
                server.status = status
                with pytest.raises((UserError, EngineError)) as raised:
                    ask(engine, ["ok 0 a"])
                said += [raised.value, raised.getrepr(showlocals=False)]
                server.status = None
        assert all(sent["Authorization"] == f"Bearer {KEY}" for sent in server.headers)
    said += [caplog.text, *capfd.readouterr()]
    assert any("***" in str(text) for text in said)
    assert all(KEY not in str(text) and KEY not in repr(text) for text in said)


def test_a_missing_or_broken_key_is_reported(server: UnrulyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = KEY
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="api-key-env"), open_engine(options(server)):
        pass
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised, open_engine(options(server)):
        pass
    assert "lines" not in str(raised.value)


@pytest.mark.parametrize(
    "url,message",
    [
        ("http://me:hunter2@host:8000/v1", "must not hold a user or a password"),
        ("http://host/v1?key=hunter2", "remove"),
        ("host:8000/v1", "not a URL"),
        ("ftp://host/v1", "not a URL"),
    ],
)
def test_bad_urls_are_refused_without_their_secrets(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        EngineOptions(MODEL, kind="endpoint", endpoints=(url,))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "endpoint"},
        {"endpoints": ("http://host/v1",)},
        {"max_num_seqs": 0},
        {"request_timeout_s": 0},
        {"endpoint_patience_s": float("nan")},
        {"max_retries": -1},
    ],
)
def test_impossible_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        EngineOptions(MODEL, **bad)


def test_passwords_in_netrc_are_not_sent(server: UnrulyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with open_engine(options(server)) as engine:
        ask(engine, ["ok 0 a"])
    assert all("Authorization" not in sent for sent in server.headers)
