"""REPRO in verl's trainer: verl's own code of a step finds it, and its advantages are verl's plus REPRO's."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import WORDS, make_words_tokenizer

ROOT = Path(__file__).parents[2]
VERL = Path(sys.prefix) / "verl"
ALPHA = 0.5
"""As in verl_trainer.py."""
FOUR = [WORDS.index(word) for word in ("after", "four")]
CLOSE, EOS = WORDS.index("</think>"), 0

RESPONSES = {
    "a_0_0": "<think> five . \n after . \n six </think> five <eos>",
    "a_1_0": "<think> seven . \n one </think> one <eos>",
    "b_0_0": "<think> two . \n after . \n three",
    "b_1_0": "</think> three <eos>",
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python, which finds verl behind everything else."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/rl"), str(VERL)])
    variables = os.environ | {"PYTHONPATH": paths, "VERL_USE_EXTERNAL_PLUGINS": "none"} | environment
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def step(verl_on_path: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs a step with an estimator, once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("verl")
    make_words_tokenizer(folder / "model")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=EOS, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    results: dict[str, dict[str, Any]] = {}

    def result(estimator: str, control: str = "none") -> dict[str, Any]:
        if (name := f"{estimator} {control}") not in results:
            (folder / "rollouts.json").write_text(json.dumps(rollouts()))
            done = run(
                str(ROOT / "tests/rl/verl_trainer.py"),
                str(folder),
                estimator,
                control,
                VERL_USE_EXTERNAL_MODULES="megatron_tpt.rl.verl_plugin",
            )
            assert done.returncode == 0, done.stderr
            results[name] = json.loads((folder / "result.json").read_text()) | {"model": str(folder / "model")}
        return results[name]

    return result


def rollouts() -> list[dict[str, Any]]:
    """Two of each of two prompts, and a row by which verl fills its batch."""
    rows = [
        {
            "key": key, "uid": key[0], "prompt_ids": FOUR, "token_ids": [WORDS.index(word) for word in text.split(" ")],
            "answer": "five", "score": float(key == "a_0_0") - 0.5 * (key == "b_0_0"),
        }
        for key, text in RESPONSES.items()
    ]  # fmt: skip
    filler = {"key": "pad_0_0", "uid": "pad", "prompt_ids": [EOS] * 3, "token_ids": [EOS], "answer": "five", "score": 0}
    return [
        *rows,
        filler | {"mask": [0], "is_padding": True},
        filler | {"key": "pad_1_0", "mask": [0], "is_padding": True},
    ]


def losses(model: Any, row: dict[str, Any], cuts: list[int]) -> list[float]:
    """L at the cuts of a rollout, from transformers."""
    answer = WORDS.index("five")
    result = []
    for cut in cuts:
        shown = row["token_ids"][:cut]
        context = [*row["prompt_ids"], *shown, *([] if CLOSE in shown else [CLOSE])]
        with torch.no_grad():
            result.append(-model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[answer].item())
    return result


CUTS = {"a_0_0": [1, 4, 7, 9], "a_1_0": [1, 4, 6], "b_0_0": [1, 4, 7, 8], "b_1_0": [0, 1]}


def expected_process(model: Any, rows: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """By the formulas of the paper: differences of S, normalized over the prompt, summed from the end."""
    rewards: dict[str, dict[int, float]] = {}
    for key, cuts in CUTS.items():
        curve = torch.tensor(losses(model, rows[key], cuts))
        scores = 1 - (curve / curve[0]).tanh()
        scores[0] = 0
        rewards[key] = dict(zip([cut - 1 for cut in cuts[1:]], scores.diff().tolist(), strict=True))
    result = {}
    for key, own in rewards.items():
        group = torch.tensor(
            [value for other, some in rewards.items() if other[0] == key[0] for value in some.values()]
        )
        placed = torch.zeros(len(rows[key]["token_ids"]))
        for place, value in own.items():
            placed[place] = (value - group.mean()) / (group.std() + 1e-6)
        result[key] = placed.flip(0).cumsum(0).flip(0)
    return result


def test_advantages_are_those_of_verl_and_of_repro(step: Callable[..., dict[str, Any]], verl_core: Any) -> None:
    from transformers import AutoModelForCausalLM

    found = step("grpo")
    model = AutoModelForCausalLM.from_pretrained(found["model"]).eval()
    rows = {row["key"]: row for row in rollouts()}
    process = expected_process(model, rows)
    assert any(len(one.unique()) > 2 for one in process.values())
    for group in "ab":
        keys = [key for key in CUTS if key[0] == group]
        scores = torch.tensor([rows[key]["score"] for key in keys])
        outcome = (scores - scores.mean()) / (scores.std() + 1e-6)
        for key, own in zip(keys, outcome, strict=True):
            expected = own + ALPHA * process[key]
            torch.testing.assert_close(torch.tensor(found["rows"][key]["advantages"]), expected, rtol=1e-4, atol=1e-4)
            assert found["rows"][key]["returns"] == pytest.approx([own.item()] * len(expected), abs=1e-5)
    assert found["rows"]["pad_0_0"]["advantages"] == [0], "a row that fills a batch is none of the rollouts"
    curves = [losses(model, rows[key], cuts) for key, cuts in CUTS.items()]
    assert found["metrics"]["repro/L_first"] == pytest.approx(sum(one[0] for one in curves) / 4, rel=1e-5)
    assert found["metrics"]["repro/L_last"] == pytest.approx(sum(one[-1] for one in curves) / 4, rel=1e-5)
    assert found["metrics"]["repro/unclosed"] == 0.25


@pytest.mark.slow(minutes=1)
def test_controls_have_rewards_of_their_own(step: Callable[..., dict[str, Any]]) -> None:
    """Constant ones charge every segment alike; shuffled ones are another order of the same."""
    outcome = step("grpo")["rows"]
    constant, shuffled = step("grpo", "constant")["rows"], step("grpo", "shuffled")["rows"]
    prices = set()
    for key, cuts in CUTS.items():
        own = torch.tensor(constant[key]["advantages"]) - torch.tensor(constant[key]["returns"])
        for left, price in zip(range(len(cuts) - 1, 0, -1), own[[cut - 1 for cut in cuts[1:]]], strict=True):
            prices.add(round(price.item() / left, 4))
    assert len(prices) == 1 and prices != {0.0}
    assert any(shuffled[key]["advantages"] != outcome[key]["advantages"] for key in CUTS)


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("estimator", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
def test_every_estimator_that_has_process_advantages_gets_them(
    estimator: str, step: Callable[..., dict[str, Any]]
) -> None:
    """The process advantage is another one in every segment. (PPO's outcome is another one at every token.)"""
    found = torch.tensor(step(estimator)["rows"]["a_0_0"]["advantages"])
    assert found.isfinite().all() and len(found.unique()) >= 4


@pytest.mark.parametrize(
    ("algorithm", "repro", "message"),
    [
        ({"adv_estimator": "gpg"}, {}, "algorithm.adv_estimator=gpg has no process advantages: give grpo, rloo"),
        ({"adv_estimator": "grpo"}, {"beta": 1}, r"repro\.beta: there is no such setting: alpha, answer_prefix"),
        ({"adv_estimator": "grpo"}, {"alpha": -1}, r"repro\.alpha=-1"),
        ({"adv_estimator": "grpo"}, {"alpha": "much"}, r"repro\.alpha: 'much' is not a number"),
        ({"adv_estimator": "grpo"}, {"control": "shuffle"}, r"repro\.control: 'shuffle' is not one of none, shuffled"),
        (
            {"adv_estimator": "grpo", "rollout_correction": {"bypass_mode": True}},
            {},
            "bypass_mode=true computes no ent",
        ),
    ],
)
def test_what_cannot_run_in_verl_is_refused(
    algorithm: dict[str, Any], repro: dict[str, Any], message: str, verl_core: Any
) -> None:
    from omegaconf import OmegaConf

    from megatron_tpt.errors import UserError
    from megatron_tpt.rl.verl_process import ReproOptions

    config = OmegaConf.create({"algorithm": {"gamma": 1.0, "lam": 1.0} | algorithm, "repro": repro})
    with pytest.raises(UserError, match=message):
        ReproOptions.of(config)


def test_settings_are_those_of_our_recipes(verl_core: Any) -> None:
    from omegaconf import OmegaConf

    from megatron_tpt.config.rl import ReproConfig
    from megatron_tpt.rl.verl_process import ReproOptions

    algorithm = {"adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": False}
    found = ReproOptions.of(OmegaConf.create({"algorithm": algorithm, "repro": {"alpha": 0.05}}))
    assert found == (ReproConfig(enabled=True, alpha=0.05), "dr_grpo", 1.0, 1.0)


def test_another_version_of_verl_is_refused_aloud(verl_on_path: None) -> None:
    done = run("-c", "import verl; verl.__version__ = '0.10.0'; import megatron_tpt.rl.verl_plugin")
    assert done.returncode == 1
    assert "trainer_mode=repro_sync of megatron_tpt is not available: it is for verl 0.9, and this is" in done.stderr


def test_verl_finds_the_plug_in() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups["verl.plugins"] == {"repro": "megatron_tpt.rl.verl_plugin"}
