from pathlib import Path

import pytest
from tiny_models import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tpt.errors import UserError
from megatron_tpt.thinking.prompts import EXPERT_TEMPLATE, ThinkingPrompt, load_template, render


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("plain")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(folder, chat_template=CHAT_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


def decode(tokenizer: PreTrainedTokenizerBase, prompt: ThinkingPrompt, document: str) -> str:
    return tokenizer.decode(prompt.encode(document).token_ids)


def test_the_default_prompt_puts_the_document_first_and_is_short() -> None:
    assert EXPERT_TEMPLATE.startswith("{document}\n")
    assert len(EXPERT_TEMPLATE.split()) < 90


def test_a_plain_model_gets_the_template_and_an_open_thinking_block(plain: PreTrainedTokenizerBase) -> None:
    prompt = ThinkingPrompt(plain, "Read: {document}", 100)
    assert decode(plain, prompt, "24 people") == "Read: 24 people\n<think>\n"
    assert prompt.encode("24 people").token_ids[-2] == plain.convert_tokens_to_ids("<think>")


def test_a_template_that_opens_the_thinking_block_stays_as_it_is(plain: PreTrainedTokenizerBase) -> None:
    prompt = ThinkingPrompt(plain, "{document}<think>\n", 100)
    assert decode(plain, prompt, "24 people") == "24 people<think>\n"


def test_a_chat_model_gets_its_own_template(chat: PreTrainedTokenizerBase) -> None:
    prompt = ThinkingPrompt(chat, "{document}\nThink.", 100)
    assert decode(chat, prompt, "Copper") == "<|user|>Copper\nThink.<|endoftext|><|assistant|>\n<think>\n"


def test_a_chat_template_that_opens_the_thinking_block_is_not_opened_twice(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template, saved = CHAT_TEMPLATE.replace("assistant|>\n", "assistant|><think>\n"), chat.chat_template
    try:
        assert render(chat, "{document}")[1] == "<|endoftext|><|assistant|><think>\n"
    finally:
        chat.chat_template = saved


def test_a_chat_template_without_the_message_is_refused(chat: PreTrainedTokenizerBase) -> None:
    chat.chat_template, saved = "Hello!", chat.chat_template
    try:
        with pytest.raises(UserError, match="does not show"):
            render(chat, "{document}")
    finally:
        chat.chat_template = saved


def test_documents_are_cut_at_the_limit_exactly(plain: PreTrainedTokenizerBase) -> None:
    document = "The ferry leaves at nine. " * 50
    ids = plain(document).input_ids
    encoded = ThinkingPrompt(plain, "{document}", 37).encode(document)
    assert encoded.token_ids[:37] == ids[:37]
    assert plain.decode(encoded.token_ids[37:]) == "\n<think>\n"
    assert encoded.num_document_tokens == len(ids) > 37


@pytest.mark.parametrize("length", [1, 2048, 5000])
def test_no_prompt_is_longer_than_announced(plain: PreTrainedTokenizerBase, length: int) -> None:
    prompt = ThinkingPrompt(plain, EXPERT_TEMPLATE, 2048)
    assert len(prompt.encode("x" * length).token_ids) <= prompt.max_tokens


def test_special_tokens_in_a_document_are_only_text(plain: PreTrainedTokenizerBase) -> None:
    prompt = ThinkingPrompt(plain, "{document}", 100)
    ids = prompt.encode("a</think><|endoftext|>b").token_ids
    assert plain.decode(ids) == "a</think><|endoftext|>b\n<think>\n"
    assert plain.convert_tokens_to_ids("</think>") not in ids
    assert plain.eos_token_id not in ids


def test_braces_in_a_document_are_only_text(plain: PreTrainedTokenizerBase) -> None:
    assert decode(plain, ThinkingPrompt(plain, "{document}", 100), "{document} {x}").startswith("{document} {x}\n")


def test_a_tokenizer_with_a_begin_token_gets_it_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    make_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 3)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|user|>")
    ids = ThinkingPrompt(tokenizer, "{document}", 100).encode("Copper").token_ids
    assert ids[0] == 3
    assert ids.count(3) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("Think about it.", "0 times"), ("{document} {document}", "2 times"), ("", "0 times"), (None, "cannot be read")],
)
def test_a_template_without_its_placeholder_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "prompt.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_template(path)
