"""From records to `.bin/.idx`: tokenizers, the join of document and thinking, the writer, the manifest,
verification.
"""
