"""Makes transformers know the classes of recurrent models, so that exports load without running the code in them."""


def register_config() -> None:
    """For AutoConfig and AutoTokenizer. Does not import torch by itself."""
    from transformers import AutoConfig

    from megatron_tpt.models.recurrent.configuration_recurrent_gpt import RecurrentGPTConfig

    AutoConfig.register(RecurrentGPTConfig.model_type, RecurrentGPTConfig, exist_ok=True)


def register_model() -> None:
    """For AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    from megatron_tpt.models.recurrent.configuration_recurrent_gpt import RecurrentGPTConfig
    from megatron_tpt.models.recurrent.modeling_recurrent_gpt import RecurrentGPTForCausalLM

    AutoModelForCausalLM.register(RecurrentGPTConfig, RecurrentGPTForCausalLM, exist_ok=True)
