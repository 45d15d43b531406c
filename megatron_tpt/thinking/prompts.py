"""The prompt that asks for thinking: the document first, a mark where it ends, then what to do with it.

A template is a text with `{document}` in it, once. The model's chat template, where it has one, goes around it, and the
thinking block is opened, so that the first token the model writes belongs to the thinking.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.generation import begin_ids

PLACEHOLDER = "{document}"
OPEN_TAG = "<think>"

EXPERT_TEMPLATE = """\
{document}

[End of the text]

Think as a leading expert would who has just read the text above, and write down the whole train of thought while you \
work it through in depth. Stay with what is difficult or rich in content and pass over what is obvious. Where it \
helps, use Feynman's method: explain the idea in plain words as if teaching it, notice where the explanation breaks \
down, and repair it until you really understand.
"""

# Stands for the document while the chat template is applied; private-use characters, which no template touches.
_MARK = "\ue000document\ue001"


class EncodedPrompt(NamedTuple):
    """A prompt ready for the engine."""

    token_ids: list[int]
    num_document_tokens: int
    """Tokens of the whole document, the part beyond the limit included."""


def load_template(path: Path | None) -> str:
    """The template in the file `path`, or the project's own. Raises UserError unless it has `{document}` once."""
    if path is None:
        return EXPERT_TEMPLATE
    try:
        template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the prompt template cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the prompt template is not UTF-8 text") from error
    if (count := template.count(PLACEHOLDER)) != 1:
        raise UserError(f"{path}: the template must have {PLACEHOLDER} exactly once, it has it {count} times")
    return template


class ThinkingPrompt:
    """A template bound to a model's tokenizer.

    The parts around the document are tokenised once, with special tokens meaning what they say. The document is raw
    text: special tokens that happen to stand in it are spelt out, so that no document can end its own prompt.
    """

    def __init__(self, tokenizer: Any, template: str, max_document_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_document_tokens = max_document_tokens
        head, tail = render(tokenizer, template)
        self._head: list[int] = tokenizer(head, add_special_tokens=False).input_ids
        self._tail: list[int] = tokenizer(tail, add_special_tokens=False).input_ids
        if tokenizer.chat_template is None:
            self._head = begin_ids(tokenizer) + self._head

    @property
    def max_tokens(self) -> int:
        """The longest prompt there can be, in tokens."""
        return len(self._head) + self._max_document_tokens + len(self._tail)

    def encode(self, document: str) -> EncodedPrompt:
        """The prompt for `document`, which is cut to `max_document_tokens`."""
        ids = self._tokenizer(document, add_special_tokens=False, split_special_tokens=True).input_ids
        return EncodedPrompt(self._head + ids[: self._max_document_tokens] + self._tail, len(ids))


def render(tokenizer: Any, template: str) -> tuple[str, str]:
    """The text before and after the document, with the chat template (where there is one) and the opened think block.

    Raises UserError for a chat template that does not show the user's message once.
    """
    content = template.replace(PLACEHOLDER, _MARK)
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": content}]
        # Models that can both think and answer at once know this switch; the others ignore it.
        content = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        if content.count(_MARK) != 1:
            raise UserError("the model's chat template does not show the user's message once; use another model")
    head, tail = content.split(_MARK)
    if not re.search(rf"{OPEN_TAG}\s*\Z", tail):
        tail += ("" if tail.endswith("\n") else "\n") + f"{OPEN_TAG}\n"
    return head, tail
