"""The sections of a recipe on reinforcement learning: prompts, rollouts, rewards, the algorithm, REPRO."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_tpt.config.data import DataSection
from megatron_tpt.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import UserError, require

Algorithm = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"]
Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "dr_grpo"]
KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
Level = Literal["token", "sequence", "sequence_mean"]
"""Whose ratio of trainer to engine: the token's; the rollout's, the product of those of its tokens; their geometric
mean."""
FirstReward = Literal["score", "gain"]
"""The first segment's reward: the score after it, S_1, as in the paper, or its gain over no thinking, S_1 - S_0.
Thinking that does not help has a score of 1 - tanh(1) = 0.24, which "score" gives to every rollout."""
Control = Literal["none", "shuffled", "constant"]


@on_change(
    {
        (Effect.CONTENT, Effect.FREE): """
            train prompt_column answer_column id_column prompt_template chat on_too_long
        """,
        (Effect.TOKENIZER, Effect.TOKENIZER): "tokenizer",
        (Effect.WARNED, Effect.FREE): "answer_type answer_pattern",
        (Effect.FREE, Effect.FREE): "validation allow_change num_workers allow_unsandboxed_code",
    }
)
@dataclass
class PromptDataConfig(DataSection):
    """Prompts whose answers can be verified."""

    train: list[str] = field(default_factory=list)
    """Files (.jsonl, .json, packed or not, .parquet, .arrow), folders or data sets of the Hub, each row with a prompt
    and its right answer, as in a benchmark of tools/evaluate.py."""
    validation: list[str] = field(default_factory=list)
    """Not used: evaluate the checkpoints (tools/evaluate.py)."""
    tokenizer: Path | None = None
    """Not used: the tokenizer is that of training.init_from, as engines have it."""
    prompt_column: str = "prompt"
    """The column with the problem. `extra.question` is the field `question` of the column `extra`."""
    answer_column: str = "answer"
    """The column with the right answer: text, a number, true or false, or a list. For code: its tests."""
    id_column: str = "id"
    """The column with the problem's id; without it, the line's number (of a folder with several files, "file:line")."""
    prompt_template: str | None = None
    """Build the prompt from columns: "Question: {question}\\nAnswer:" (\\n is a line break), or a file with such a
    text."""
    chat: bool = False
    """Show the prompt to the model as a user's message, in its chat template."""
    answer_type: Literal["exact", "number", "math", "choice", "boolean", "jee", "code"] = "exact"
    """How answers are read and compared: as text; as a number; as mathematics, which needs math-verify; as one of the
    options A to J; as yes or no; as JEEBench's letters, integers and decimals; as code that must pass its tests."""
    answer_pattern: str | None = None
    """A regular expression that finds the answer in the output: the last match, its first group."""
    on_too_long: Literal["stop", "skip"] = "stop"
    """What to do with a prompt that leaves less than rollouts.max_new_tokens of training.sequence_length: stop, or skip
    it and say how many."""
    allow_change: bool = False
    """Resume from a checkpoint with other prompts than before; without, that is refused."""
    allow_unsandboxed_code: bool = False
    """Run the code of answers with your own rights where there is no sandbox (bubblewrap)."""

    def __post_init__(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise UserError(f"data.answer_pattern={self.answer_pattern!r} is no regular expression: {error}") from None


@on_change(
    {
        (Effect.REFUSED, Effect.FREE): "num_prompts num_samples",
        (Effect.WARNED, Effect.FREE): "temperature max_new_tokens dynamic_sampling max_waves",
        (Effect.FREE, Effect.FREE): """
            prompts_per_wave engine max_num_seqs max_gap endpoints patience_s gpu_memory weight_transfer weights_dir
        """,
    }
)
@dataclass
class RolloutsConfig:
    """What is sampled in an iteration, and by which engine. Always from all tokens (top-p 1): the probabilities of a
    part of them, which the engine would renormalize, are none that the trainer could compute."""

    num_prompts: PositiveInt = 8
    """Prompts of an iteration."""
    num_samples: PositiveInt = 8
    """Rollouts of every prompt: a group."""
    temperature: Annotated[float, Gt(0), Le(2)] = 1.0
    """Temperature of sampling; log-probabilities and losses are those of the distribution that is sampled from."""
    max_new_tokens: PositiveInt = 64
    """Longest response in tokens. Prompt and response together have at most training.sequence_length."""
    prompts_per_wave: PositiveInt | None = None
    """Prompts that are sampled and graded together; all of an iteration when not given. Finished waves are on the disk:
    an interruption loses at most the current one."""
    dynamic_sampling: bool = False
    """Drop prompts whose rollouts all have the same reward of the answer, which teach nothing, and sample others in
    their place (DAPO, arXiv 2503.14476, 3.2)."""
    max_waves: PositiveInt = 20
    """With dynamic_sampling: stop an iteration that is not filled after this many waves."""
    engine: Literal["vllm", "vllm-server", "endpoint", "transformers"] = "vllm"
    """What samples, with the trainer's weights, which are sent before every iteration: in every process vLLM (on CPUs);
    a vLLM server for every process, on its GPU or CPU; vLLM servers that run already, for all processes (endpoint); or
    in every process transformers, which is slow and runs everywhere."""
    endpoints: list[str] = field(default_factory=list)
    """URLs of the servers for engine=endpoint, such as http://node7:8000/v1, which `python -m megatron_tpt.rl.serve`
    starts."""
    weight_transfer: Literal["folder", "nccl", "ipc"] = "folder"
    """How servers get the weights: as files; by a broadcast to other GPUs (engine=endpoint); in the memory of the GPU
    that they share with the trainer (engine=vllm-server)."""
    weights_dir: Path | None = None
    """Where the files of weight_transfer=folder are, the weights of one iteration at a time; all nodes must see it
    under the same path. RUN/engine-weights when not given."""
    patience_s: PositiveFloat = 1800.0
    """How long a server that does not answer is waited for."""
    gpu_memory: Share | None = None
    """The share of a GPU's memory that a server takes; what vLLM chooses when not given, which leaves a trainer on the
    same GPU no room."""
    max_num_seqs: PositiveInt | None = None
    """Most rollouts that an engine computes at once; its own choice when not given."""
    max_gap: PositiveFloat = 1e-4
    """Largest difference of log-probabilities of engine and trainer, in nats, on what the engine writes after every
    update of its weights; more is an error. 1e-4 is enough in float32; in bfloat16 give more, by the metric
    mismatch/probe_gap_max of the first iterations."""

    def __post_init__(self) -> None:
        check_bounds(self, "rollouts.")

    @property
    def has_servers(self) -> bool:
        """Whether servers sample."""
        return self.engine in ("vllm-server", "endpoint")


@on_change(
    {
        (Effect.WARNED, Effect.FREE): """
            format_weight overlong_buffer overlong_factor length_penalty functions
        """,
        (Effect.FREE, Effect.FREE): "num_workers time_limit_s",
    }
)
@dataclass
class RewardsConfig:
    """The reward of a rollout: 1 for a right answer and 0 for a wrong one, and what is added to it."""

    format_weight: NonNegativeFloat = 0.0
    """Added for a response of the form <think> ... </think> answer."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before rollouts.max_new_tokens over which a penalty grows to overlong_factor (DAPO's soft overlong
    punishment, arXiv 2503.14476, equation 13); 0: none."""
    overlong_factor: PositiveFloat = 1.0
    """The largest such penalty."""
    length_penalty: Share = 0.0
    """Subtracted from right answers alone: this times their length over rollouts.max_new_tokens."""
    functions: list[str] = field(default_factory=list)
    """Functions of your own as package.module:function, in a module of the current folder or of PYTHONPATH; each is
    called as function(prompt, response, answer) with texts, and what it returns, a number, is added."""
    num_workers: PositiveInt = 1
    """Processes per rank that grade answers."""
    time_limit_s: PositiveFloat = 5.0
    """Processor time for one answer; one that takes longer is wrong."""

    def __post_init__(self) -> None:
        check_bounds(self, "rewards.")


@on_change(
    {
        (Effect.REFUSED, Effect.FREE): "num_epochs",
        (Effect.WARNED, Effect.FREE): """
            name gamma lam clip_low clip_high dual_clip aggregation kl kl_coefficient kl_estimator
            reference reference_refresh entropy_coefficient mask_truncated mismatch mismatch_level mismatch_lower
            mismatch_upper
        """,
    }
)
@dataclass
class AlgorithmConfig:
    """How rewards become gradients."""

    name: Algorithm = "grpo"
    """Where advantages come from: the rewards of a prompt's other rollouts (grpo, dr_grpo, rloo,
    reinforce_plus_plus_baseline), of the batch (reinforce_plus_plus), or a critic (ppo)."""
    num_epochs: PositiveInt = 1
    """Times over the rollouts of an iteration."""
    gamma: Share = 1.0
    """Discount of the rewards of later tokens (PPO, REINFORCE++, REPRO)."""
    lam: Share = 1.0
    """Decay of generalized advantage estimation (PPO)."""
    clip_low: Share = 0.2
    """A ratio of new to old probability below 1 - clip_low has no gradient where the advantage is negative."""
    clip_high: PositiveFloat = 0.2
    """A ratio above 1 + clip_high has no gradient where the advantage is positive."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Largest ratio with a gradient where the advantage is negative; no limit when not given."""
    aggregation: Aggregation = "token_mean"
    """Weights of the tokens of a step: all the same, all rollouts the same (sequence_mean_...), or by the limit of the
    length (dr_grpo, as in its paper)."""
    kl: Literal["none", "loss", "reward"] = "none"
    """Where a divergence from the reference model is penalized."""
    kl_coefficient: NonNegativeFloat = 0.001
    """Factor of the divergence, in nats per token."""
    kl_estimator: KLEstimator = "k3"
    """Estimate of the divergence: k1, k2, k3; with +, the value with the gradient of k2."""
    reference: Path | None = None
    """Checkpoint of the reference model; training.init_from when not given."""
    reference_refresh: NonNegativeInt = 0
    """Iterations after which the policy becomes the reference, again and again; 0: never."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Factor of the entropy that is added to what is maximized."""
    mask_truncated: bool = False
    """Learn nothing from rollouts that end at rollouts.max_new_tokens. They still count in the groups' statistics."""
    mismatch: Literal["none", "truncate", "mask"] = "none"
    """Correct the losses by the ratio of the trainer's to the engine's probability, truncated (TIS), or 0 outside of
    the bounds (mask). The metrics mismatch/* are there in any case."""
    mismatch_level: Level = "token"
    """Whose ratio: the token's, the rollout's, or the geometric mean of those of its tokens."""
    mismatch_lower: PositiveFloat = 0.5
    """Smallest ratio with mismatch=mask."""
    mismatch_upper: PositiveFloat = 2.0
    """Largest ratio."""

    def __post_init__(self) -> None:
        check_bounds(self, "algorithm.")
        require(
            self.mismatch_lower <= self.mismatch_upper,
            f"algorithm.mismatch_lower={self.mismatch_lower} must be at most mismatch_upper={self.mismatch_upper}",
        )


@on_change(
    {
        (Effect.WARNED, Effect.FREE): """
            enabled alpha num_segments answer_prefix answer_template first_reward stability_weight ema_weight control
        """,
    }
)
@dataclass
class ReproConfig:
    """Process rewards by how much the thinking helps to predict the right answer: REPRO, arXiv 2512.01925."""

    enabled: bool = False
    """Add process advantages to those of the outcome."""
    alpha: NonNegativeFloat = 0.1
    """Factor of the process advantages."""
    num_segments: PositiveInt = 20
    """Segments of the thinking that have a reward: those whose first token had the highest entropy."""
    answer_prefix: str = ""
    """Text between the truncated thinking and the answer, not scored. Small models need one that closes the
    thinking: "</think>\\n"."""
    answer_template: str = "\\boxed{{{}}}"
    """The right answer as it is appended and scored; {} is its place, other braces are doubled."""
    first_reward: FirstReward = "score"
    """The first segment's reward: the score after it (as in the paper), or its gain over that without thinking."""
    stability_weight: Share = 0.0
    """w of the score (1 - w) magnitude + w stability."""
    ema_weight: Annotated[float, Gt(0), Le(1)] = 0.01
    """Weight of the newest point in the moving average that stability is computed from; 1 does not smooth."""
    control: Control = "none"
    """For comparisons, rewards that do not depend on what a segment says: those of the iteration in random order
    (shuffled), or for every segment what one gets that does not help (constant), a price for length."""

    def __post_init__(self) -> None:
        check_bounds(self, "repro.")
        require_place(self.answer_template)


def require_place(template: str) -> None:
    """Raise UserError for an answer_template without a place for the answer."""
    try:
        has_place = "\0" in template.format("\0")
    except (IndexError, KeyError, ValueError):
        has_place = False
    require(has_place, f'answer_template {template!r} must have one "{{}}" for the answer; other braces are doubled')


def can_be_appended(answer: object) -> bool:
    """Whether REPRO can append a right answer: one text, no list of them, and no solution that ends in it."""
    if isinstance(answer, str):
        return bool(answer.strip()) and not any(mark in answer for mark in ("####", "\\boxed", "\n"))
    return isinstance(answer, int | float)


@on_change({(Effect.WARNED, Effect.FREE): "learning_rate warmup_iterations clip"})
@dataclass
class CriticConfig:
    """PPO's critic: a second model of the same shape, with a value head on the weights of training.init_from."""

    learning_rate: PositiveFloat = 1e-5
    """Its learning rate; the rest of its optimizer is the policy's."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations at the start in which only the critic is trained."""
    clip: PositiveFloat | None = 0.2
    """Values may move so far from the old ones within an iteration; no limit when not given."""

    def __post_init__(self) -> None:
        check_bounds(self, "critic.")
