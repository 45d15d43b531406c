"""Training on Megatron Core: from a checked recipe and opened data to checkpoints and metrics.

builder.py makes a trainer, trainer.py is the loop, callbacks.py and others are what happens around it; steps.py is
one forward and backward pass, checkpoint_*.py saving and loading, *data*.py and sample_*.py what is read.
May import objectives, models, indexing, jobs, platform, records, config and the single modules; it knows no kind of
recipe, and of a loss only its sums' names.
"""
