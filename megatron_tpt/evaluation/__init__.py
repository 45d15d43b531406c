"""Evaluation: models answer problems, the answers are checked, accuracy is the mean over problems and samples."""
