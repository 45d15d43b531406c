"""Thinking: an off-the-shelf model writes an expert's thoughts about every document."""
