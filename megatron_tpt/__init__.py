"""Thinking-augmented pre-training on Megatron Core, from raw documents to a reasoning model."""

__version__ = "0.1.0"
