"""Weights and tokenizers between Megatron Core checkpoints and Hugging Face folders.

What is common to all families: reading checkpoints, checks, files; how the tensors of a family map is in its folder of
models/.
May import training (checkpoint files), indexing (tokenizers), models, platform, config and the single modules.
"""
