"""Training on Megatron Core: from a validated recipe and opened data to checkpoints and metrics.

builder.py builds a trainer, trainer.py is the loop, callbacks.py and others hold the callbacks; steps.py is one forward
and backward pass, checkpoint_*.py saves and loads, *data*.py and sample_*.py read the data. May import objectives,
models, indexing, jobs, platform, records, config and the single modules; does not depend on the kind of recipe, and
knows only the names of the sums that an objective returns.
"""
