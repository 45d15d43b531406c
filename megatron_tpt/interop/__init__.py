"""Weights and tokenizers between Megatron Core checkpoints and Hugging Face folders."""
