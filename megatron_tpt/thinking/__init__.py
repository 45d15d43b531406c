"""Thinking: an off-the-shelf model writes an expert's thoughts about every document.

The job of `tools/augment.py` (augment.py, job.py, task.py): prompts, requests to an engine, filters, retries, records
with thinking; and the analysis of what was written (analysis.py).
May import generation, jobs, records, config and the single modules; nothing of training or indexing.
"""
