"""The prompts of a run: which fit, and in which order they are sampled from."""

from pathlib import Path
from typing import Any

import pytest
from rl_runs import NUMBERS, make_problems, make_words_tokenizer, rl_recipe

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl.prompts import Prompts, read_prompts


def prompts(folder: Path, max_new_tokens: int, on_too_long: str) -> Prompts:
    """Of eight rows with two tokens and one with four; a row has 8 tokens."""
    problems = make_problems(folder / "problems.jsonl")
    with problems.open("a") as file:
        file.write('{"id": "long", "prompt": "after one two three", "answer": "four"}\n')
    make_words_tokenizer(folder / "run/engine")
    changes: dict[str, dict[str, Any]] = {
        "data": {"train": [str(problems)], "on_too_long": on_too_long},
        "training": {"init_from": None, "sequence_length": 8},
        "rollouts": {"max_new_tokens": max_new_tokens},
    }
    recipe = recipe_from_dict(RLRecipe, rl_recipe(folder, problems, folder / "run", **changes))
    assert isinstance(recipe, RLRecipe)
    return read_prompts(recipe)


def test_prompts_that_are_too_long_are_refused_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(prompts(tmp_path, 4, "stop")) == 9
    message = r"1 of 9 prompts have more than 3 tokens \(the longest 4\), which is what .*=5 leaves of .*=8"
    with pytest.raises(UserError, match=message + ": raise that, or give --data.on_too_long=skip"):
        prompts(tmp_path, 5, "stop")
    assert len(prompts(tmp_path, 5, "skip")) == 8
    assert "1 of 9 prompts have more than 3 tokens" in caplog.text and "they are skipped" in caplog.text


@pytest.mark.parametrize("on_too_long", ["stop", "skip"])
def test_where_no_prompt_fits_skipping_is_no_advice(on_too_long: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"9 of 9 prompts .*: raise that, or lower rollouts\.max_new_tokens$"):
        prompts(tmp_path, 7, on_too_long)


def test_every_epoch_has_all_prompts_in_another_order(tmp_path: Path) -> None:
    found = prompts(tmp_path, 5, "skip")
    epochs = [[found[position].problem.id for position in range(begin, begin + 8)] for begin in (0, 8, 16)]
    assert all(sorted(epoch) == sorted(NUMBERS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert found[8].problem.id == epochs[1][0], "the order does not depend on what was asked before"
