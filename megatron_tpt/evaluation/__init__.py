"""Evaluation: models answer problems, the answers are checked, accuracy is the mean over problems and samples.

Problems are rows of files (problems.py), asked and graded by evaluate.py, which writes samples.jsonl and results.json.
Documents measure perplexity (perplexity.py); recurrent models are compared over their depth (recurrences.py).
May import generation, grading, records, config and the single modules; nothing of training.
"""
