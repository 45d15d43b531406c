"""Texts and tokenizer folders for the indexing tests."""

import json
import random
from pathlib import Path

SYLLABLES = ["ba", "ko", "ri", "the", "ung", "tion", "é", "ß", "日本", "Ω", "🙂", "'", "-", "7", "42"]


def generated_text(seed: int, num_words: int) -> str:
    """Text of many scripts and spacings; the same for the same seed."""
    rng = random.Random(seed)
    words = ("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(num_words))
    return "".join(word + rng.choice([" ", " ", " ", "\n", "  ", ". ", "\t"]) for word in words)


def edit_tokenizer(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder; `changes` replace entries of tokenizer.json, or take away those that are None."""
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text()) | changes
    content = {key: value for key, value in content.items() if key not in changes or value is not None}
    (target / "tokenizer.json").write_text(json.dumps(content))
    (target / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return target
