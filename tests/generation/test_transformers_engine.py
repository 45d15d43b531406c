"""The transformers engine, against vLLM and against the distribution it should draw from."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, CORPUS, make_model, unchanged_environment
from transformers import LlamaForCausalLM

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Engine,
    EngineOptions,
    Failure,
    Request,
    Sampling,
    complete,
    load_tokenizer,
    open_engine,
)

PROMPTS = [f"{text} {i}" for i in range(3) for text in CORPUS]
GREEDY = Sampling(temperature=0, max_new_tokens=24)
HOT = Sampling(temperature=1.2, top_p=0.8, max_new_tokens=16, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    with open_engine(EngineOptions(model, 256, kind="transformers", max_num_seqs=4)) as engine:
        yield engine


def test_greedy_completions_equal_those_of_vllm(model: str, engine: Engine) -> None:
    tag = Sampling(temperature=0, max_new_tokens=24, stop=("f", "</think>"))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with unchanged_environment(), open_engine(EngineOptions(model, 256)) as vllm:
        assert complete(engine, PROMPTS, GREEDY) == complete(vllm, PROMPTS, GREEDY)
        assert complete(engine, chats, GREEDY) == complete(vllm, chats, GREEDY)
        mine, theirs = complete(engine, PROMPTS, tag), complete(vllm, PROMPTS, tag)
    assert mine == theirs
    assert any(completion.token_ids[-1] != 0 and completion.finish_reason == "stop" for completion in mine)


def test_a_seed_decides_the_output_whatever_the_batch(model: str, engine: Engine) -> None:
    together = complete(engine, PROMPTS, HOT)
    with open_engine(EngineOptions(model, 256, kind="transformers", max_num_seqs=1)) as single:
        assert complete(single, PROMPTS, HOT) == together
    assert complete(engine, PROMPTS, Sampling(temperature=1.2, top_p=0.8, max_new_tokens=16, seed=4)) != together


def test_samples_have_the_temperature_and_top_p_that_were_asked(model: str) -> None:
    num_samples, sampling = 4000, Sampling(temperature=1.5, top_p=0.7, max_new_tokens=1, seed=0)
    with open_engine(EngineOptions(model, 256, kind="transformers", max_num_seqs=500)) as engine:
        drawn = Counter(c.token_ids[0] for c in complete(engine, CORPUS[:1] * num_samples, sampling))
    ids = load_tokenizer(model)(CORPUS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        probabilities = (LlamaForCausalLM.from_pretrained(model)(ids).logits[0, -1] / 1.5).softmax(0)
    ordered, order = probabilities.sort(descending=True)
    num_kept = int((ordered.cumsum(0) < 0.7).sum()) + 1
    kept = dict(zip(order[:num_kept].tolist(), (ordered[:num_kept] / ordered[:num_kept].sum()).tolist(), strict=True))
    assert set(drawn) <= set(kept)
    for token, probability in kept.items():
        deviation = (probability * (1 - probability) / num_samples) ** 0.5
        assert abs(drawn[token] / num_samples - probability) < 5 * deviation


def test_limits_are_each_requests_own(engine: Engine) -> None:
    requests = [Request(PROMPTS[0], Sampling(temperature=0, max_new_tokens=n), key=n) for n in (1, 5, 24)]
    done = {request.key: outcome for request, outcome in engine.generate(requests)}
    longest = done[24].token_ids  # type: ignore[union-attr]
    assert [done[n].token_ids for n in (1, 5)] == [longest[:1], longest[:5]]  # type: ignore[union-attr]


def test_a_prompt_that_is_too_long_fails_alone(engine: Engine) -> None:
    requests = [Request([5] * length, GREEDY, key=length) for length in (255, 256, 0)]
    done = {request.key: outcome for request, outcome in engine.generate(requests)}
    assert done[255].num_tokens == 1  # type: ignore[union-attr]
    assert [done[length].reason for length in (256, 0)] == ["prompt_too_long", "bad_request"]  # type: ignore[union-attr]
    assert isinstance(done[256], Failure)


def test_one_device_is_all_it_can_use(model: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="one device"),
        open_engine(EngineOptions(model, kind="transformers", tensor_parallel_size=2)),
    ):
        pass
