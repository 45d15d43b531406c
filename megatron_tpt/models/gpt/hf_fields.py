"""The fields of a Hugging Face config.json: which are read, which must have a fixed value, which are only kept.

No field that may change the computation is ignored. A field is, in this order:

1. read (`READ_FIELDS`): the shape, the rotary positions, the biases;
2. fixed (`_FIXED`): refused unless it has a value with which the supported models compute the same;
3. kept (`_KEPT`): known not to affect the computation, such as token ids and sampling defaults;
4. unknown: refused if its name suggests that it affects the computation (`_MAY_MATTER`) and its value is not neutral,
   otherwise kept and listed in a note.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError

_READ = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling
    rope_parameters original_max_position_embeddings tie_word_embeddings attention_dropout attention_bias mlp_bias
    torch_dtype dtype
"""
READ_FIELDS = frozenset(_READ.split())
"""Fields that an export writes from the checkpoint."""

_OFF = (None, False)
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "use_sliding_window": _OFF,
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "per_layer_config": (None,),
    "chunk_size_feed_forward": (None, 0),
}

_NO_EFFECT = """
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id use_cache auto_map
    transformers_version tokenizer_class name_or_path torchscript use_bfloat16 tf_legacy_loss prefix
    task_specific_params problem_type finetuning_task id2label label2id num_labels return_dict use_return_dict
    output_attentions output_hidden_states output_past output_scores return_dict_in_generate is_decoder
    tie_encoder_decoder gradient_checkpointing attn_implementation max_window_layers sliding_window layer_types
    max_sequence_length max_seq_length max_seq_len seq_length seq_len model_max_length do_sample temperature top_k
    top_p typical_p min_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences num_beams num_beam_groups diversity_penalty
    max_length min_length early_stopping forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_KEPT = frozenset(_NO_EFFECT.split())

_MAY_MATTER = re.compile(
    r"scal(e|ing|ar)|multipl|softcap|soft_cap|logit|sliding|window|chunk|bias|rotary|rope|norm|expert|moe|quant|compress"
    r"|residual|alibi|activation|(^|_)act(_|$)|clip|dropout|pdrop|(^|_)mup|lora|loop|recurren|mtp|nextn|(^|_)dims?(_|$)"
    r"|layer|head|_size$|atten|attn|mask|parallel|mixer|mamba|ssm|conv|pooling|gat(e|ing)|router|position|embed"
    r"|(^|_)[qkv]+(_|$)|share|adapter|vision|audio|image"
)
_IMPLEMENTATION = re.compile(r"^_|flash|sdpa|implementation")
"""Names that choose a kernel, and private ones, which transformers sets itself."""
_FACTOR = re.compile(r"scal|multipl|factor")


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the value turns a feature of this name off: null, false, empty, 0, or a factor of 1."""
    if isinstance(value, int | float) and value == 1 and not isinstance(value, bool):
        return _FACTOR.search(name) is not None
    return not value


def refuse_unsupported(config: dict[str, Any], source: Path) -> None:
    """Raise UserError for the first field whose value requires an unsupported feature."""
    for name, supported in _FIXED.items():
        if name in config and config[name] not in supported:
            wanted = next(value for value in supported if value is not None or len(supported) == 1)
            raise UserError(f"{source}: {name}={reprlib.repr(config[name])} is not supported, only {wanted!r} is")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(f"{source}: layer_types other than full_attention are not supported")
    if config.get("sliding_window") is not None and config.get("model_type") == "llama":
        raise UserError(
            f"{source}: sliding_window={reprlib.repr(config['sliding_window'])} is not supported, only None is"
        )
    for name in _unknown(config):
        if _MAY_MATTER.search(name.lower()) and not _is_neutral(name, config[name]):
            raise UserError(
                f"{source}: {name}={reprlib.repr(config[name])} may change what the model computes, and no supported "
                f"model reads it: remove it there if transformers computes the same without it"
            )


def _unknown(config: dict[str, Any]) -> list[str]:
    known = READ_FIELDS | _KEPT | _FIXED.keys()
    return sorted(name for name in config if name not in known and not _IMPLEMENTATION.search(name))


def describe_kept(config: dict[str, Any]) -> list[str]:
    """Notes about fields that have no effect here and are kept for exports, or are dropped."""
    lines = []
    if unknown := _unknown(config):
        lines.append(f"fields that no supported model reads are kept for exports: {', '.join(unknown)}")
    if config.get("auto_map"):
        lines.append("auto_map: the model's own code is not used; transformers' class of the same name is what counts")
    return lines


def kept_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that an export keeps unchanged, without auto_map, which refers to the model's own code."""
    return {name: value for name, value in config.items() if name not in READ_FIELDS and name != "auto_map"}
