"""The format that the options of tools/pack_sft.py ask for."""

from typing import NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.chat_shapes import ChatColumns
from megatron_tpt.indexing.chat_template import ChatTemplate
from megatron_tpt.indexing.conversations import ConversationFormat, PairFormat
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer


class ChosenFormat(NamedTuple):
    """How records become examples."""

    format: PairFormat | ConversationFormat
    template: ChatTemplate | None
    """The chat template of conversations; none where only texts can be packed."""
    loss_mask: str
    """Where the loss mask comes from: generation spans, prefixes, or response."""


def choose_format(options: PackOptions, tokenizer: Tokenizer) -> ChosenFormat:
    """The format for `options`. Raises UserError for a chat template that is missing or unusable."""
    columns = ChatColumns(
        options.conversation_column, options.tools_column, ignored_fields=frozenset(options.ignore_fields)
    )
    for_chats = options.conversation_options()
    pair = None
    if options.prompt_column is not None and options.response_column is not None:
        pair = (options.prompt_column, options.response_column)
    try:
        template = ChatTemplate(tokenizer, options.chat_template, options.today(), options.template_variables())
    except UserError as error:
        if pair is not None and not for_chats:  # texts need none
            return ChosenFormat(PairFormat(tokenizer, *pair, no_chats=str(error)), None, "response")
        raise
    chats = ConversationFormat(tokenizer, template, columns, options.inline_reasoning)
    if pair is not None:
        return ChosenFormat(PairFormat(tokenizer, *pair, chats, for_chats), template, "response")
    return ChosenFormat(chats, template, "generation spans" if template.has_generation_spans else "prefixes")
