"""Annotators that are models of your own, on this machine: fastText files, and Hugging Face classifiers in a folder.

    --classify NAME=model.bin      fastText: NAME is the likeliest label, NAME_score its probability
    --classify NAME=FOLDER         AutoModelForSequenceClassification: the same; of a regression, NAME is its value

Only the beginning of a long text is seen: 16 Ki characters by fastText, as many tokens as it takes by the other.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tpt.corpus.annotate import Annotator
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import UserError

_FASTTEXT_SUFFIXES = (".bin", ".ftz")
_MAX_CHARACTERS = 1 << 14
_BATCH = 32
_DIGITS = 4


def load_classifier(name: str, path: Path) -> Annotator:
    """The classifier at `path`, whose result is the field `name`. Raises UserError for what is none."""
    if path.suffix in _FASTTEXT_SUFFIXES and path.is_file():
        return FastText(name, path)
    if (path / "config.json").is_file():
        return HuggingFaceClassifier(name, path)
    raise UserError(
        f"--classify {name}={path}: no classifier is there; give a fastText model (.bin, .ftz) or the folder of a "
        "Hugging Face classifier"
    )


class FastText:
    """A fastText model. (datatrove's filter refuses to load one without labels to keep or to remove.)"""

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        try:
            from fasttext.FastText import _FastText

            self._model = _FastText(str(path))
        except ImportError:
            raise UserError(
                f"--classify {name}={path}: the Python package fasttext is not installed: "
                "pip install fasttext-numpy2-wheel, or give a Hugging Face classifier"
            ) from None
        except ValueError as error:
            raise UserError(f"--classify {name}={path}: not a fastText model ({error})") from None

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`."""
        return [self._annotate(one.text[:_MAX_CHARACTERS]) for one in documents]

    def _annotate(self, text: str) -> dict[str, Any]:
        labels, scores = self._model.predict(text.replace("\n", " "))
        label = labels[0].removeprefix("__label__") if labels else None
        score = min(1.0, round(float(scores[0]), _DIGITS)) if labels else None  # fastText's own is at times 1.00001
        return {self._name: label, f"{self._name}_score": score}


class HuggingFaceClassifier:
    """A sequence classifier, on a GPU where there is one. Every process loads its own when it first needs it."""

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoConfig

        self._name, self._folder = name, folder
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise self._failure(error) from error
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"--classify {name}={folder}: holds no *.safetensors; save the model in that format")

    @cached_property
    def _loaded(self) -> tuple[Any, Any, str]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(
                self._folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise self._failure(error) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return tokenizer, model.eval().to(device), device

    def _failure(self, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [""])[0]
        return UserError(
            f"--classify {self._name}={self._folder}: cannot be loaded ({reason}); give the folder of a Hugging Face "
            "sequence classifier with its tokenizer"
        )

    def annotate(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """See `Annotator.annotate`. Texts of about the same length are computed together; padding is masked."""
        order = sorted(range(len(documents)), key=lambda place: len(documents[place].text))
        found: list[dict[str, Any]] = [{}] * len(documents)
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            results = self._classify([documents[place].text for place in places])
            for place, result in zip(places, results, strict=True):
                found[place] = result
        return found

    def _classify(self, texts: list[str]) -> list[dict[str, Any]]:
        import torch

        tokenizer, model, device = self._loaded
        longest = min(tokenizer.model_max_length, _num_positions(model))
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=longest)
        with torch.inference_mode():
            logits = model(**inputs.to(device)).logits.double().cpu()
        if model.config.num_labels == 1:
            return [{self._name: round(value, _DIGITS)} for value in logits[:, 0].tolist()]
        scores, labels = logits.softmax(-1).max(-1)
        names = model.config.id2label
        return [
            {self._name: names[label], f"{self._name}_score": round(score, _DIGITS)}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]


def _num_positions(model: Any) -> int:
    """The longest text in tokens. RoBERTa and its kin number positions from behind that of padding."""
    import torch

    most = int(getattr(model.config, "max_position_embeddings", 512))
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding) and one.num_embeddings == most]
    return most - max((one.padding_idx + 1 for one in tables if one.padding_idx is not None), default=0)
