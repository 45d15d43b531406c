"""Servers that refuse: one request, all of them, or all of them from some time on."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Completion,
    EngineOptions,
    Failure,
    Request,
    Sampling,
    complete,
    open_engine,
)
from megatron_tpt.generation.request_fields import parse_request_fields

SAMPLING = Sampling(max_new_tokens=7, stop=("END",), seed=5)
MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
TEMPERATURE = "Unsupported value: 'temperature' does not support 0.6 with this model."


def options(*servers: UnrulyServer, **changes: Any) -> EngineOptions:
    quick: dict[str, Any] = {"request_timeout_s": 1.0, "max_retries": 2, "endpoint_patience_s": 60.0}
    return EngineOptions(MODEL, kind="endpoint", endpoints=tuple(server.url for server in servers), **quick | changes)


def ask(options: EngineOptions, prompts: list[Any]) -> dict[str, Completion | Failure]:
    with open_engine(options) as engine:
        outcomes = [(request.key, outcome) for request, outcome in engine.generate(
            Request(prompt, SAMPLING, key=str(prompt)) for prompt in prompts
        )]  # fmt: skip
    assert sorted(key for key, _ in outcomes) == sorted(map(str, prompts))
    return dict(outcomes)


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as server:
        yield server


@pytest.mark.parametrize(
    "sentence,advice",
    [
        (MAX_TOKENS, "--length-field max_completion_tokens"),
        (TEMPERATURE, "--omit-fields temperature or --temperature 1"),
        ("max_tokens is too large: 8192. This model supports at most 4096.", "a lower --max-new-tokens"),
        ("you must provide a chat template if the tokenizer does not define one", "--api completions"),
        ("This model's maximum context length is 8 tokens.", ""),
        ("你好", ""),
    ],
)
@pytest.mark.parametrize("max_num_seqs", [1, 16])
def test_a_server_that_refuses_everything_ends_generation_with_its_sentence(
    server: UnrulyServer, sentence: str, advice: str, max_num_seqs: int
) -> None:
    server.refuses = lambda body: sentence
    with pytest.raises(UserError, match=re.escape(sentence)) as raised:
        ask(options(server, max_num_seqs=max_num_seqs), [f"ok 0 {i}" for i in range(500)])
    assert advice in str(raised.value) and "refuses every request" in str(raised.value)
    assert len(server.bodies) < 60


@pytest.mark.parametrize("prompts", [["ok 0 a"], [[1, 2, 3], [4, 5]]])
def test_a_few_requests_that_are_all_refused_end_generation_too(server: UnrulyServer, prompts: list[Any]) -> None:
    server.refuses = lambda body: "no"
    with pytest.raises(UserError, match="no"):
        ask(options(server), prompts)
    assert isinstance(server.bodies[-1]["prompt"], type(prompts[0]))  # the test has the form of the prompts


def test_refused_requests_are_failures_where_the_server_serves_others(server: UnrulyServer) -> None:
    bad = ["400 9 a", "long 9 b", "422 9 c"]
    assert {type(outcome) for outcome in ask(options(server), bad).values()} == {Failure}  # by the short test alone
    outcomes = ask(options(server, max_num_seqs=2), [*bad, *(f"ok 0 {i}" for i in range(20))])
    assert {prompt for prompt, outcome in outcomes.items() if isinstance(outcome, Failure)} == set(bad)


def test_a_server_that_begins_to_refuse_everything_ends_the_run_and_not_the_requests(server: UnrulyServer) -> None:
    server.refuses = lambda body: "model gone" if len(server.bodies) > 30 else None
    done: list[Any] = []
    with (
        open_engine(options(server, max_num_seqs=4)) as engine,
        pytest.raises(UserError, match=r"has completed \d+ requests and now refuses.*model gone"),
    ):
        for _, outcome in engine.generate(Request(f"ok 0 {i}", SAMPLING) for i in range(500)):
            done.append(outcome)
    assert all(isinstance(outcome, Completion) for outcome in done) and 25 < len(done) <= 30


def test_a_completion_of_something_sent_before_proves_nothing(server: UnrulyServer) -> None:
    """The server begins to refuse everything while its first answer is still being written."""
    server.refuses = lambda body: "gone" if len(server.bodies) > 1 else None
    done: dict[Any, Any] = {}
    with open_engine(options(server)) as engine, pytest.raises(UserError, match=r"refuses every request.*gone"):
        for request, outcome in engine.generate(
            Request(p, SAMPLING) for p in ["slow 0 a", *("ok 0 b" for _ in range(4))]
        ):
            done[request.prompt] = outcome
    assert list(done) == ["slow 0 a"] and isinstance(done["slow 0 a"], Completion)


def test_one_server_that_refuses_everything_makes_no_failures_beside_one_that_serves(server: UnrulyServer) -> None:
    with unruly_server() as other:
        other.refuses = lambda body: "wrong build"
        done: list[Any] = []
        with (
            open_engine(options(server, other, max_num_seqs=2)) as engine,
            pytest.raises(UserError, match=f"{other.url}.*wrong build"),
        ):
            for _, outcome in engine.generate(Request(f"ok 0 {i}", SAMPLING) for i in range(500)):
                done.append(outcome)
                time.sleep(0.01)
        assert all(isinstance(outcome, Completion) for outcome in done)


def test_a_short_test_that_ends_in_an_outage_has_the_refused_retried(server: UnrulyServer) -> None:
    """They were refused by a server that was in trouble, and serves them once it is out of it."""
    asked: list[str] = []

    def refuses(body: dict[str, Any]) -> str | tuple[int, str] | None:
        asked.append(body["prompt"])
        if body["prompt"] == "Hello.":
            return 503, "starting"
        return "starting" if asked.count(body["prompt"]) == 1 else None

    server.refuses = refuses
    outcomes = ask(options(server), ["ok 0 a", "ok 0 b"])
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values()) and "Hello." in asked


@pytest.mark.parametrize(
    "code,reason", [(400, "bad_request"), ("413", "prompt_too_long"), ("invalid_request_error", "bad_request")]
)
def test_an_error_in_an_answer_with_status_200_is_that_error(
    server: UnrulyServer, code: int | str, reason: str
) -> None:
    error = {"error": {"message": "the provider says no", "code": code}}
    server.answers = {"ok 0 bad": error}
    outcome = ask(options(server), ["ok 0 bad", "ok 0 good"])["ok 0 bad"]
    assert isinstance(outcome, Failure) and outcome.reason == reason and "the provider says no" in outcome.message


@pytest.mark.parametrize(
    "message,text,reasoning",
    [
        ({"content": None, "reasoning_content": None}, "", None),
        ({"content": None, "refusal": "I will not."}, "I will not.", "hm"),
        ({"reasoning_content": "", "reasoning": ""}, "answer to ok 0 a", None),
        ({"reasoning_content": None, "reasoning": "why"}, "answer to ok 0 a", "why"),
        (
            {
                "reasoning_content": None,
                "content": [
                    {
                        "type": "thinking",
                        "thinking": [{"type": "text", "text": "so "}, {"type": "text", "text": "it is"}],
                    },
                    {"type": "text", "text": "done"},
                ],
            },
            "done",
            "so it is",
        ),
    ],
)
def test_the_shapes_of_a_chat_answer_are_read(
    server: UnrulyServer, message: dict[str, Any], text: str, reasoning: str | None
) -> None:
    server.message = message
    with open_engine(options(server, api="chat")) as engine:
        [completion] = complete(engine, [[{"role": "user", "content": "ok 0 a"}]], SAMPLING)
    assert (completion.text, completion.reasoning) == (text, reasoning)


def test_request_fields_are_sent_and_ours_can_be_renamed_or_omitted(server: UnrulyServer) -> None:
    server.owner = "vllm"
    fields = parse_request_fields(["top_k=20", 'chat_template_kwargs={"enable_thinking": false}', "service_tier=flex"])
    chat = options(
        server,
        api="chat",
        request_fields=fields,
        length_field="max_completion_tokens",
        omit_fields=("temperature", "top_p", "stop"),
    )
    with open_engine(chat) as engine:
        complete(engine, [[{"role": "user", "content": "ok 0 a"}]], SAMPLING)
    [body] = server.bodies
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["service_tier"] == "flex"
    assert body["top_k"] == 20  # over the neutral value that vLLM is sent else
    assert body["max_completion_tokens"] == 7 and body["seed"]
    assert not {"max_tokens", "temperature", "top_p", "stop"} & set(body)


@pytest.mark.parametrize(
    "field,message",
    [
        ("temperature=1", "--omit-fields temperature"),
        ("max_completion_tokens=5", "--length-field"),
        ("model=x", "--model"),
        ("n=2", "--rollouts"),
        ("stream=true", "read whole"),
        ('extra_body={"top_k": 1}', "client library"),
        ("chat_template_kwargs=5", "give an object"),
        ("chat_template_kwargs={enable_thinking: false}", "not valid JSON"),
        ("think=False", "write false"),
        ("alone", "NAME=VALUE"),
        ("=5", "NAME=VALUE"),
        ("{'chat_template_kwargs={\"enable_thinking\"': 'false}'}", "in quotes in a recipe"),  # YAML's, without quotes
        ("reasoning_effort=low", "--api chat"),
    ],
)
def test_fields_that_are_not_the_users_to_set_are_refused(field: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        EngineOptions(MODEL, kind="endpoint", endpoints=("http://h/v1",), request_fields=parse_request_fields([field]))


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="top_k: given twice"):
        parse_request_fields(["top_k=1", "top_k=2"])
