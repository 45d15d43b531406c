"""fastText models as annotators; their package is optional."""

import importlib.util
from pathlib import Path

import pytest

from megatron_tpt.corpus.annotate.classifiers import load_classifier
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import UserError

IS_INSTALLED = importlib.util.find_spec("fasttext") is not None


@pytest.mark.skipif(not IS_INSTALLED, reason="the package fasttext-numpy2-wheel is not installed")
def test_the_likeliest_label_of_the_beginning_is_annotated(tmp_path: Path) -> None:
    import fasttext

    (tmp_path / "train.txt").write_text("__label__math sum root prime\n__label__web sale shop price\n" * 40)
    fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=40, lr=1.0, dim=8).save_model(
        str(tmp_path / "kind.bin")
    )
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
