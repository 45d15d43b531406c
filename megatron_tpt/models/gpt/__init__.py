"""Llama- and Qwen-family models."""
