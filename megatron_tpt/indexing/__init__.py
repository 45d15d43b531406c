"""From records to `.bin/.idx`, and from conversations to packed rows: what training reads.

Tokenizers (tokenizer.py, encoders.py, ...), the join of document and thinking (join.py), writer, manifest,
verification, merging and inspection; chat templates and packing (chat_*.py, pack_sft.py). marks.py says which tokens
are thinking.
May import jobs, records, config and the single modules; no torch.
"""
