"""Every number that training reports, as a pure function of what was measured."""

import dataclasses
import math

from megatron_tpt.config.model import ModelConfig


def model_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations that one token of training needs: forward and backward, no recomputation counted.

    6 per weight of every matrix product (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), the output matrix
    included and the embedding look-up not, plus 6 * layers * sequence_length * heads * head_dim for the two attention
    products under a causal mask (half of the 12 that full attention needs).
    """
    h, width = model.hidden_size, model.num_attention_heads * model.kv_channels
    qkv_width = width + 2 * model.query_groups * model.kv_channels
    weights_per_layer = h * qkv_width + width * h + 3 * h * model.ffn_hidden_size
    weights = model.num_layers * weights_per_layer + model.padded_vocab_size * h
    return 6.0 * weights + 6.0 * model.num_layers * sequence_length * width


@dataclasses.dataclass
class LossSums:
    """Sums of token losses in nats, and the tokens they are over, by kind."""

    document_loss: float = 0.0
    document_tokens: float = 0.0
    thinking_loss: float = 0.0
    thinking_tokens: float = 0.0

    def means(self, document_name: str = "document") -> dict[str, float]:
        """Mean loss over all tokens, and over each kind of which there are tokens."""
        tokens = self.document_tokens + self.thinking_tokens
        result = {"loss": (self.document_loss + self.thinking_loss) / tokens if tokens else math.nan}
        if self.document_tokens:
            result[f"loss_{document_name}"] = self.document_loss / self.document_tokens
        if self.thinking_tokens:
            result["loss_thinking"] = self.thinking_loss / self.thinking_tokens
        return result


def throughput(
    num_tokens: int,
    seconds: float,
    data_wait_s: float,
    *,
    flops_per_token: float,
    num_devices: int,
    peak_tflops: float | None,
) -> dict[str, float]:
    """Speed over an interval of training steps (checkpoints and validation apart).

    num_tokens counts all processes, seconds is wall time. `tflops_per_device` is model FLOP/s (see
    model_flops_per_token) over the devices; `mfu` divides it by peak_tflops, the dense peak of one device.
    """
    tokens_per_s = num_tokens / seconds
    tflops = tokens_per_s * flops_per_token / num_devices / 1e12
    result = {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / num_devices,
        "tflops_per_device": tflops,
        "data_wait_s": data_wait_s,
        "data_wait_fraction": data_wait_s / seconds,
    }
    if peak_tflops is not None:
        result["mfu"] = tflops / peak_tflops
    return result
