"""Corpus: clean documents out of raw ones, without duplicates and without what the evaluation sets hold; and strata.

The job of `tools/prepare.py`, in stages of many tasks: exact and near duplicates, decontamination, writing. That of
`tools/curate.py` also annotates what is kept, and says which strata it is in. Records in, records out.
May import generation (judges), indexing (tokenizers, shapes of chats), records, jobs, config and the single modules; no
other stage.
"""
