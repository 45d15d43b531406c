"""A step of verl's own trainer with REPRO on a CPU, where neither Ray nor verl's engines run.

    python verl_trainer.py FOLDER ADV_ESTIMATOR CONTROL

FOLDER/model is a model that transformers reads, FOLDER/rollouts.json has the rollouts, CONTROL is repro.control. verl's
code is real: it finds the plug-in, and its trainer computes old log-probabilities and advantages. Stand-ins are the
TransferQueue, which is not installed, in memory; the packages that verl imports and this does not use; and the workers,
one model in this process.
Writes FOLDER/result.json.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

UNUSED = ("torchdata", "peft", "hydra", "wandb", "TransferQueue")


@dataclass
class KVBatchMeta:
    """As in TransferQueue."""

    keys: list[str]
    tags: list[dict[str, Any]]
    partition_id: str
    fields: list[str] | None = None
    extra_info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


class Queue(types.ModuleType):
    """The module transfer_queue: rows by key, in memory."""

    def __init__(self) -> None:
        super().__init__("transfer_queue")
        self.rows: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, Any]] = {}
        self.KVBatchMeta = KVBatchMeta
        self.BatchMeta = type("BatchMeta", (), {})

    def kv_batch_get(self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str]) -> Any:
        """Fields that there are not are omitted."""
        from verl.utils import tensordict_utils

        assert partition_id == "train"
        columns = {name: [self.rows[key][name] for key in keys] for name in select_fields if name in self.rows[keys[0]]}
        return tensordict_utils.get_tensordict(
            {
                name: torch.nested.as_nested_tensor(values, layout=torch.jagged)
                if isinstance(values[0], torch.Tensor)
                else values
                for name, values in columns.items()
            }
        )

    def kv_batch_put(self, keys: Sequence[str], partition_id: str, fields: Any) -> KVBatchMeta:
        """Add or replace fields of rows."""
        assert partition_id == "train"
        for name in fields.keys():  # noqa: SIM118
            for key, value in zip(keys, fields[name].unbind(), strict=True):
                self.rows[key][name] = value
        return KVBatchMeta(list(keys), [self.tags[key] for key in keys], partition_id)


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if not name.startswith("__") else _missing(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _missing(name: str) -> Any:
    raise AttributeError(name)


class Workers:
    """The actor's workers: two ranks in this process."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._dispatch_info = {"actor": [0, 1]}

    @torch.no_grad()
    def compute_log_prob(self, batch: Any) -> Any:
        """As the workers of verl are called: with what is in the queue, or with the data."""
        from verl.protocol import BatchData

        if isinstance(batch, KVBatchMeta):
            data = QUEUE.kv_batch_get(batch.keys, batch.partition_id, ["input_ids"])
            assert batch.extra_info["calculate_entropy"]
            QUEUE.kv_batch_put(batch.keys, batch.partition_id, self._scored(data, batch.extra_info["temperature"]))
            return batch
        parts = BatchData(batch).chunk(2)
        return BatchData([self._scored(part, part["temperature"]) for part in parts]).concat()

    def _scored(self, data: Any, temperature: float) -> Any:
        """Of every token the log-probability of the next one, and the entropy."""
        from verl.utils import tensordict_utils

        columns: dict[str, list[torch.Tensor]] = {"log_probs": [], "entropy": []}
        for ids in data["input_ids"].unbind():
            distribution = (self._model(ids[None]).logits[0] / temperature).log_softmax(-1)
            columns["log_probs"].append(distribution.gather(-1, ids.roll(-1)[:, None])[:, 0])
            columns["entropy"].append(-(distribution.exp() * distribution).sum(-1))
        return tensordict_utils.get_tensordict(
            {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
        )


QUEUE = Queue()


def put_rollouts(rows: Sequence[dict[str, Any]]) -> KVBatchMeta:
    """As verl's agent loops put them."""
    for row in rows:
        prompt, response = torch.tensor(row["prompt_ids"]), torch.tensor(row["token_ids"])
        scores = torch.zeros(len(response))
        scores[-1] = row["score"]
        mask = torch.tensor(row.get("mask", [1] * len(response)))
        QUEUE.tags[row["key"]] = {"is_padding": True} if row.get("is_padding") else {}
        QUEUE.rows[row["key"]] = {
            "prompts": prompt, "responses": response, "input_ids": torch.cat([prompt, response]),
            "response_mask": mask, "loss_mask": mask, "rm_scores": scores, "uid": row["uid"],
            "reward_model": {"ground_truth": row["answer"]}, "values": torch.linspace(-1, 1, len(response)),
        }  # fmt: skip
    keys = [row["key"] for row in rows]
    return KVBatchMeta(keys, [QUEUE.tags[key] for key in keys], "train", extra_info={"temperature": 0.7})


def main() -> None:
    folder, estimator, control = sys.argv[1:]
    path = Path(folder)
    sys.meta_path.append(Unused())
    sys.modules["transfer_queue"] = QUEUE
    import transformers
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import get_trainer_cls

    rollouts = json.loads((path / "rollouts.json").read_text())
    config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": estimator, "use_kl_in_reward": False, "gamma": 1.0, "lam": 0.9,
                "norm_adv_by_std_in_grpo": True,
            },
            "actor_rollout_ref": {
                "rollout": {"temperature": 0.7, "n": 2, "calculate_log_probs": False},
                "actor": {"loss_agg_mode": "token-mean", "loss_scale_factor": None},
            },
            "repro": {
                "alpha": 0.5, "num_segments": 2, "answer_prefix": "</think>", "answer_template": "{}",
                "control": control,
            },
        }
    )  # fmt: skip
    from megatron_tpt.rl.verl_process import ReproOptions

    trainer = object.__new__(get_trainer_cls("repro_sync"))  # without Ray
    trainer.config, trainer._repro, trainer.global_steps = config, ReproOptions.of(config), 1
    trainer.tokenizer = transformers.AutoTokenizer.from_pretrained(path / "model")
    trainer.actor_rollout_wg = Workers(transformers.AutoModelForCausalLM.from_pretrained(path / "model").eval())
    batch, metrics = put_rollouts(rollouts), dict[str, Any]()
    info = batch.extra_info
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch.extra_info = info
    batch = trainer._compute_advantage(batch, metrics)
    names = ("advantages", "returns", "old_log_probs")
    found = {key: {name: row[name].tolist() for name in names} for key, row in QUEUE.rows.items()}
    (path / "result.json").write_text(json.dumps({"rows": found, "metrics": metrics}))


if __name__ == "__main__":
    main()
