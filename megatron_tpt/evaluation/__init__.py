"""Evaluation: models answer problems, the answers are checked, accuracy is the mean over problems and samples.

Problems are rows of files (problems.py), asked and graded by evaluate.py, which writes samples.jsonl and results.json.
May import generation, grading, records, config and the single modules; nothing of training.
"""
