"""A small verifiable task, a model that does not know it, and runs of the program on it.

The tokens are whole words. After "after four" the right answer is "five", and so on around the circle of numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
import zstandard
from training_runs import read_metrics

PROGRAM = "megatron_tpt.rl.__main__"

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
WORDS = ("<eos>", "<think>", "</think>", "<unk>", *NUMBERS, "after", ".", "\n")


def make_words_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with the think tags and an end-of-sequence token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" "), "removed"), pre_tokenizers.Split(Regex(r"\n|\."), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>", "<think>", "</think>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_start(folder: Path, *, tied: bool = False, num_layers: int = 2) -> Path:
    """A checkpoint with random weights, whose heads are large enough for vLLM."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_tpt.interop.hf_import import import_hf
    from megatron_tpt.interop.options import ImportOptions

    model = folder / "model"
    make_words_tokenizer(model)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=tied,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(model)
    import_hf(ImportOptions(model, folder / "start"))
    return folder / "start"


def make_problems(path: Path, numbers: tuple[str, ...] = NUMBERS) -> Path:
    """A row for each of `numbers`."""
    following = {one: NUMBERS[(place + 1) % len(NUMBERS)] for place, one in enumerate(NUMBERS)}
    rows = [{"id": one, "prompt": f"after {one}", "answer": following[one]} for one in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def share_of_fours(prompt: str, response: str, answer: str) -> float:
    """A reward that differs between rollouts of random words."""
    return response.count("four") / 4


def failing(prompt: str, response: str, answer: str) -> float:
    """A reward with a fault."""
    return {}[response]


def speechless(prompt: str, response: str, answer: str) -> None:
    """A reward that is none."""


def undefined(prompt: str, response: str, answer: str) -> float:
    """A reward that is no number."""
    return float("nan")


def of_two(prompt: str, response: str) -> float:
    """A reward that does not take the answer."""
    return 0.0


def rl_recipe(start: Path, problems: Path, folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one-token answers as YAML would give it; `changes` are fields by section."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"output_dir": str(folder), "seed": 1},
        "training": {
            "init_from": str(start), "num_steps": 4, "sequence_length": 16, "global_batch_size": 16,
            "micro_batch_size": 1, "dtype": "float32",
        },
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "logging": {"log_interval": 1, "tensorboard": False},
        "checkpoint": {"save_interval": 2},
        "data": {"train": [str(problems)]},
        "rollouts": {
            "num_prompts": 4, "num_samples": 8, "max_new_tokens": 1, "engine": "transformers", "max_num_seqs": 32
        },
    }  # fmt: skip
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields}
    return sections


def write_recipe(recipe: dict[str, Any]) -> Path:
    """The file of a recipe, next to its run folder."""
    path = Path(f"{recipe['run']['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


SAME = ("step", "loss", "grad_norm", "reward", "accuracy", "rollout_entropy", "critic/loss", "critic/grad_norm")
THINKING: dict[str, Any] = {
    "training": {"sequence_length": 32},
    "rollouts": {"max_new_tokens": 14, "prompts_per_wave": 2},
    "repro": {"enabled": True, "alpha": 0.5, "num_segments": 3, "answer_prefix": "</think>", "answer_template": "{}"},
    "rewards": {"functions": ["rl_runs:share_of_fours"], "length_penalty": 0.1},
}
"""Longer rollouts, with thinking here and there, and every reward of many steps."""
PPO: dict[str, Any] = {"algorithm": {"name": "ppo", "gamma": 0.99, "lam": 0.95}, "critic": {"learning_rate": 1e-3}}
EVERY_STEP: dict[str, Any] = {"checkpoint": {"save_interval": 1}}


def merged(*changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for one in changes:
        for section, fields in one.items():
            result[section] = result.get(section, {}) | fields
    return result


def rollouts_of(run: Path) -> list[list[dict[str, Any]]]:
    """The lines of all finished iterations."""
    found = []
    for path in sorted((run / "rollouts").glob("iteration_????????.jsonl.zst")):
        with zstandard.open(path, "rt") as file:
            found.append([json.loads(line) for line in file])
    return found


def learned(run: Path) -> list[dict[str, Any]]:
    """What must be the same, of every line of the metrics."""
    return [{name: row[name] for name in SAME if name in row} for row in read_metrics(run)]


def has_step(step: int) -> Callable[[Path], bool]:
    def is_due(run: Path) -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and f'"step": {step}, "loss"' in path.read_text()

    return is_due
