"""Models: one folder per family, chosen by `model.family` of a recipe.

A folder has a configuration (fields, tensors, activations: parameters, FLOPs and memory follow), a build on Megatron
Core and, where there is one, a Hugging Face adapter; its `SPEC` is what everything else asks. May import platform,
config and the single modules. Specs and configurations are free of torch.
"""
