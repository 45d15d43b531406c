"""Corpus: clean documents out of raw ones, without duplicates and without what the evaluation sets hold.

The job of `tools/prepare.py`, in stages of many tasks: exact and near duplicates, decontamination, writing. Records in,
records out.
May import records, jobs, config and the single modules; no other stage.
"""
