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
    """The chat template that settles the tokens; none for prompts and responses."""
    loss_mask: str
    """Where the loss mask comes from: generation spans, prefixes, or response."""


def choose_format(options: PackOptions, tokenizer: Tokenizer) -> ChosenFormat:
    """The format for `options`. Raises UserError for a chat template that is missing or not fit."""
    columns = ChatColumns(
        options.conversation_column, options.tools_column, ignored_fields=frozenset(options.ignore_fields)
    )
    variables = options.template_variables()
    is_pair = options.prompt_column is not None and options.response_column is not None
    has_template_options = options.chat_template is not None or options.date is not None or bool(variables)
    try:
        template = ChatTemplate(tokenizer, options.chat_template, options.today(), variables)
    except UserError:
        if is_pair and not has_template_options:  # texts need none
            assert options.prompt_column is not None and options.response_column is not None
            return ChosenFormat(PairFormat(tokenizer, options.prompt_column, options.response_column), None, "response")
        raise
    chats = ConversationFormat(tokenizer, template, columns, options.inline_reasoning)
    if options.prompt_column is not None and options.response_column is not None:
        pairs = PairFormat(tokenizer, options.prompt_column, options.response_column, chats, has_template_options)
        return ChosenFormat(pairs, template if has_template_options else None, "response")
    return ChosenFormat(chats, template, "generation spans" if template.has_generation_spans else "prefixes")
