"""What models are trained for, each objective in one file: the outputs of a model and a batch -> a loss and named sums.

The trainer, detection of bad steps and reporting know the names of the sums alone; a new loss term or metric is written
in its objective and nowhere else. May import platform, config and Megatron Core; nothing of training.
"""
