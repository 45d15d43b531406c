"""Corpus: clean documents out of raw ones, without duplicates and without what the evaluation sets hold."""
