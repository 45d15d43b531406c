"""The range of every number in a recipe; ranges that other fields decide are checked where these are known."""

from collections.abc import Callable
from typing import Any

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # in words, as a test, and the fields
    "1 or more": (
        lambda value: value >= 1,
        """
        run.threads_per_process
        model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups
        model.head_dim model.vocab_size model.vocab_padding_multiple model.max_position_embeddings
        """,
    ),
    "0 or more": (
        lambda value: value >= 0,
        """
        run.time_limit_min run.time_limit_margin_min
        model.norm_epsilon model.init_std
        optimizer.weight_decay optimizer.adam_epsilon optimizer.clip_grad
        checkpoint.save_interval faults.max_skips faults.max_rollbacks data.num_workers profiling.ranks
        """,
    ),
    "above 0": (
        lambda value: value > 0,
        """
        model.rotary_base model.rope_low_freq_factor model.rope_high_freq_factor model.rope_beta_fast
        model.rope_beta_slow model.rope_attention_factor
        optimizer.muon_scale_factor logging.peak_tflops data.phases.until_tokens
        """,
    ),
    "0 or more, and below 1": (
        lambda value: 0 <= value < 1,
        "model.hidden_dropout model.attention_dropout optimizer.adam_beta1 optimizer.adam_beta2",
    ),
    "a whole number from 0 to 4294967295": (lambda value: 0 <= value < 2**32, "run.seed"),  # what NumPy's seeds are
}
_RANGE_OF = {name: (holds, words) for words, (holds, names) in _RANGES.items() for name in names.split()}


def range_missed(key: tuple[str | int, ...], value: Any) -> str | None:
    """What the value of a field must be and is not, in words; None when it is."""
    holds, words = _RANGE_OF.get(".".join(part for part in key if isinstance(part, str)), (None, ""))
    return words if holds is not None and value is not None and not holds(value) else None
