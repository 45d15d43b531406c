"""Evaluation: models answer benchmarks, the answers are graded, and figures come with all that defends them.

A benchmark is a YAML file (benchmark.py, benchmarks/); its rows become problems (problems.py, choices.py, shots.py,
templates.py). asking.py has an engine answer what is missing, samples.py keeps answers as they come, evaluate.py grades
them when all are there, metrics.py, results.py and contamination.py make figures of the grades, report.py shows them.
Documents are a benchmark without answers (perplexity.py). A recurrent model at each of several depths is an arm of its
own (arms.py, recurrences.py). lm_eval_bridge.py runs tasks of lm-evaluation-harness on the same engines.
May import generation, grading, jobs, records, config and the single modules; nothing of training.
"""
