"""Training objectives, one per file: they compute a loss and named sums from the outputs of a model and a batch.

The trainer, the detection of bad steps and the reporting only know the names of the sums; a new loss term or metric
only changes its objective. May import platform, config and Megatron Core, but not training.
"""
