"""Models: one folder per family, chosen by `model.family` of a recipe.

A folder has a configuration (fields, tensors and activations, which determine parameters, FLOPs and memory), a build on
Megatron Core and possibly a Hugging Face adapter; all other code uses its `SPEC`. May import platform, config and
the single modules. Specs and configurations do not import torch.
"""
