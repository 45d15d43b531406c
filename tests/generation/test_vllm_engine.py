"""The vLLM engine on a real (tiny) model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import CORPUS, make_model, make_tokenizer, unchanged_environment

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    EngineOptions,
    Request,
    Sampling,
    VLLMEngine,
    check_context,
    check_model,
    complete,
    derive_seed,
    load_tokenizer,
)

PROMPTS = [f"{text} {i}" for i in range(4) for text in CORPUS]
GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[VLLMEngine]:
    with unchanged_environment(), VLLMEngine(EngineOptions(model, max_model_len=256, max_num_seqs=4)) as engine:
        yield engine


def test_greedy_completions_equal_those_of_transformers(model: str, engine: VLLMEngine) -> None:
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(model)
    reference = LlamaForCausalLM.from_pretrained(model)
    for prompt, completion in zip(PROMPTS, complete(engine, PROMPTS, GREEDY), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = reference.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert list(completion.token_ids) == expected.tolist()
        assert completion.num_prompt_tokens == ids.shape[1]


def test_text_and_token_ids_are_the_same_prompt(model: str, engine: VLLMEngine) -> None:
    ids = [load_tokenizer(model)(prompt).input_ids for prompt in PROMPTS]
    assert complete(engine, ids, GREEDY) == complete(engine, PROMPTS, GREEDY)


def test_a_completion_at_the_limit_is_marked(engine: VLLMEngine) -> None:
    for completion in complete(engine, PROMPTS, Sampling(max_new_tokens=5, seed=0)):
        assert completion.finish_reason == ("length" if completion.token_ids[-1] != 0 else "stop")
        assert len(completion.token_ids) <= 5


def test_seeds_decide_the_output(engine: VLLMEngine) -> None:
    sampling = Sampling(temperature=1, top_p=0.9, max_new_tokens=16, seed=3)
    first = complete(engine, PROMPTS, sampling)
    assert complete(engine, PROMPTS, sampling) == first
    assert complete(engine, PROMPTS, Sampling(temperature=1, top_p=0.9, max_new_tokens=16, seed=4)) != first
    same_prompt = complete(engine, PROMPTS[:1] * 4, sampling)
    assert len({completion.token_ids for completion in same_prompt}) > 1


def test_a_stop_text_ends_the_completion_and_is_left_out(engine: VLLMEngine) -> None:
    [whole] = complete(engine, PROMPTS[:1], GREEDY)
    stop = whole.text[8:11]
    [cut] = complete(engine, PROMPTS[:1], Sampling(temperature=0, max_new_tokens=24, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_the_end_tag_stops_as_a_token_and_is_left_out(engine: VLLMEngine) -> None:
    # So hot that every token comes up now and then, the end tag too.
    sampling = Sampling(temperature=2, top_p=1, max_new_tokens=200, stop=("</think>",), seed=0)
    completions = complete(engine, PROMPTS, sampling)
    ended = [completion for completion in completions if completion.token_ids[-1] == 2]
    assert ended
    for completion in completions:
        assert 2 not in completion.token_ids[:-1]
        assert "</think>" not in completion.text
        assert "<|endoftext|>" not in completion.text
    assert all(completion.finish_reason == "stop" for completion in ended)


def test_requests_are_taken_as_places_become_free(engine: VLLMEngine) -> None:
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for prompt in PROMPTS:
            taken += 1
            yield Request(prompt, GREEDY, key=taken)

    keys = []
    for request, _ in engine.generate(requests()):
        keys.append(request.key)
        assert taken - len(keys) <= 8  # four computed, four waiting
    assert sorted(keys) == list(range(1, len(PROMPTS) + 1))


def test_leaving_early_abandons_the_rest(engine: VLLMEngine) -> None:
    for _ in engine.generate(Request(prompt, GREEDY) for prompt in PROMPTS):
        break
    assert len(complete(engine, PROMPTS[:2], GREEDY)) == 2


def test_a_model_that_vllm_cannot_run_ends_with_one_line(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "small_heads"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(
            UserError, match=r"vLLM cannot (load|run) this model \(.*\); --engine transformers may"
        ) as caught,
        unchanged_environment(),
        VLLMEngine(EngineOptions(str(folder), max_model_len=64)) as own,
    ):
        complete(own, PROMPTS[:1], GREEDY)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_share_a_model(model: str, engine: VLLMEngine) -> None:
    with unchanged_environment(), VLLMEngine(EngineOptions(model, 256, tensor_parallel_size=2)) as shared:
        assert complete(shared, PROMPTS, GREEDY) == complete(engine, PROMPTS, GREEDY)


def test_a_seed_of_a_name_stays_the_same() -> None:
    assert derive_seed(0, "a") == derive_seed(0, "a") == 739273521946992771
    seeds = {derive_seed(seed, name, i) for seed in range(5) for name in ("a", "b") for i in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": 3}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**bad)  # type: ignore[arg-type]


def test_a_context_that_is_too_small_is_refused(model: str) -> None:
    assert check_context(model, 412, 100) == 512
    with pytest.raises(UserError, match=r"context is 512 tokens.*need 513"):
        check_context(model, 413, 100)


def test_a_tokenizer_needs_no_model_in_its_folder(tmp_path: Path, model: str) -> None:
    shutil.copy(Path(model) / "tokenizer.json", tmp_path)
    shutil.copy(Path(model) / "tokenizer_config.json", tmp_path)
    assert load_tokenizer(str(tmp_path))(PROMPTS).input_ids == load_tokenizer(model)(PROMPTS).input_ids
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(UserError, match=r"without tokenizer\.json, transformers finds its class by config\.json"):
        load_tokenizer(str(tmp_path))


def test_no_model_is_no_traceback(tmp_path: Path, model: str) -> None:
    def broken_copy(name: str, *missing: str) -> str:
        folder = shutil.copytree(model, tmp_path / name)
        for file in missing:
            (folder / file).unlink()
        return str(folder)

    def refused(path: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            check_model(path)
            load_tokenizer(path)

    refused(str(tmp_path / "nowhere"), "no such model folder")
    refused(broken_copy("a", "config.json"), r"no config\.json")
    refused(broken_copy("b", "model.safetensors"), "no weights")
    refused(broken_copy("c", "tokenizer.json"), "no tokenizer")
    without_eos = broken_copy("d")
    make_tokenizer(Path(without_eos), eos=False)
    refused(without_eos, "names no EOS")
    damaged = broken_copy("e")
    (Path(damaged) / "model.safetensors").write_bytes(b"no tensors")
    refused(damaged, "damaged or truncated")
    whole = (Path(model) / "model.safetensors").read_bytes()
    (Path(damaged) / "model.safetensors").write_bytes(whole[:-1])
    refused(damaged, "damaged or truncated")


def test_what_vllm_refuses_is_no_traceback(tmp_path: Path, model: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(UserError, match="vLLM cannot load"), unchanged_environment():
        VLLMEngine(EngineOptions(str(folder), max_model_len=64))
