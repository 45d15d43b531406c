"""Log-probabilities of rows of tokens by the trainer's model and by engines, all in this process.

`likelihood_worker.py CHECKPOINT MODEL ENGINE...` reads rows (token ids, all of one length) as JSON from its input. The
last line it prints is JSON: by "trainer" and every engine's name, the log-probabilities of every row's tokens but the
first. The trainer's process groups exist before the engines, as vLLM would otherwise make its own.
"""

import json
import sys
from pathlib import Path

import torch

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.generation import EngineKind, EngineOptions, ScoringRequest, log_likelihoods, open_engine
from megatron_tpt.interop.hf_export import read_model_config
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.training.checkpoint_loading import load_weights


@torch.no_grad()
def by_trainer(checkpoint: Path, rows: list[list[int]], parallel: ParallelConfig) -> list[list[float]]:
    """Those of the model as it is trained, in fp32, over the vocabulary without its padding.

    The training loss itself counts the rows that pad the vocabulary (to a multiple of 128) as tokens.
    """
    tokens, model = torch.tensor(rows), read_model_config(checkpoint)
    gpt = build_model(model, parallel, TrainingConfig(dtype="float32"), seed=0).eval()
    load_weights(checkpoint, gpt)
    inputs = tokens[:, :-1].contiguous()
    logits = gpt(inputs, torch.arange(inputs.shape[1]).expand_as(inputs), attention_mask=None)
    log_probabilities = logits[..., : model.vocab_size].log_softmax(-1)
    own: list[list[float]] = log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0].tolist()
    return own


def by_engine(kind: EngineKind, model: str, rows: list[list[int]]) -> list[list[float]]:
    requests = [ScoringRequest(row[:1], row[1:]) for row in rows]
    options = EngineOptions(model, len(rows[0]) + 1, "float32", max_num_seqs=4, kind=kind)
    with open_engine(options, needs=["log-likelihood"]) as engine:
        return [list(likelihood.log_probabilities) for likelihood in log_likelihoods(engine, requests)]


def main() -> None:
    rows = json.load(sys.stdin)
    checkpoint, model, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    parallel = ParallelConfig()
    with platform.process_groups(parallel):
        platform.seed_everything(0)
        found = {"trainer": by_trainer(checkpoint, rows, parallel)}
        for kind in kinds:
            found[kind] = by_engine(kind, model, rows)  # type: ignore[arg-type]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
