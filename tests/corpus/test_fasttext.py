"""fastText models as annotators; their package is optional."""

import contextlib
import importlib.util
import random
from pathlib import Path

import pytest

from megatron_tpt.corpus.annotate.classifiers import load_classifier
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import UserError

IS_INSTALLED = importlib.util.find_spec("fasttext") is not None


@pytest.mark.skipif(not IS_INSTALLED, reason="the package fasttext-numpy2-wheel is not installed")
def test_the_likeliest_label_of_the_beginning_is_annotated(tmp_path: Path) -> None:
    import fasttext

    draw = random.Random(0)
    words = {"math": ["sum", "root", "prime", "angle"], "web": ["sale", "shop", "price", "cart"]}
    lines = [f"__label__{name} {' '.join(draw.choices(own, k=8))}" for _ in range(200) for name, own in words.items()]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    for _ in range(50):
        with contextlib.suppress(RuntimeError):  # training with this package fails at random; prediction does not
            model = fasttext.train_supervised(str(tmp_path / "train.txt"), dim=16, lr=0.05, thread=1, epoch=20)
            model.save_model(str(tmp_path / "kind.bin"))
            break
    texts = ["prime\n\nsum of a root", "shop sale", "prime sum " * 2000 + "sale " * 30_000, "unknown", "?"]
    found = load_classifier("kind", tmp_path / "kind.bin").annotate([Document(text) for text in texts])
    assert [one["kind"] for one in found[:3]] == ["math", "web", "math"]
    assert all(one["kind"] in ("math", "web", None) and 0 <= (one["kind_score"] or 0) <= 1 for one in found)
    assert all(one["kind_score"] > 0.8 for one in found[:3])
    (tmp_path / "broken.bin").write_text("no model")
    with pytest.raises(UserError, match="not a fastText model"):
        load_classifier("kind", tmp_path / "broken.bin")


@pytest.mark.skipif(IS_INSTALLED, reason="the package is installed")
def test_without_the_package_a_message_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "kind.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pip install fasttext-numpy2-wheel"):
        load_classifier("kind", tmp_path / "kind.bin")
