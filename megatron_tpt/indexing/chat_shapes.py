"""The shapes in which chat data come, read into one: messages as OpenAI writes them, tools, template variables.

A shape is recognized by a record's fields. Whatever a record holds in its messages is either understood or refused by
name; nothing in them is dropped. Other columns are not read, and named once by the caller.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tpt.indexing.chat_values import Unusable, maybe_json, parsed, present, text_of, truth_of

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Where conversations are looked for when the named column is not there."""
_PROMPT, _COMPLETION = "prompt", "completion"
_ALPACA = ("instruction", "input", "output", "history")
TEMPLATE_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
"""Names that chat_template_kwargs must not replace."""

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_response", "observation", "tool_response", "ipython", "function"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_LEARNED = ("weight", "train", "training", "trainable", "learn", "loss", "loss_mask", "loss_weight")
_NOT_LEARNED = ("masked",)
_MESSAGE_FIELDS = {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING_FIELDS}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_CALL_PART = "tool_call"

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatColumns:
    """Which columns of a record are read, and which fields of a message need not be understood."""

    messages: str = "messages"
    tools: str = "tools"
    template_kwargs: str = "chat_template_kwargs"
    system: str = "system"
    ignored_fields: frozenset[str] = frozenset()

    @property
    def extra(self) -> tuple[str, ...]:
        """Columns that are read in addition to the conversation, where a record has them."""
        return (self.tools, self.template_kwargs, self.system)

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that may be read."""
        usual = (*CONVERSATION_COLUMNS, _PROMPT, _COMPLETION, *_ALPACA) if self.may_differ else ()
        return tuple(dict.fromkeys((self.messages, *usual, *self.extra)))

    @property
    def may_differ(self) -> bool:
        """Whether other columns than that of the messages are looked for: unless the user named it."""
        return self.messages == CONVERSATION_COLUMNS[0]


@dataclass(frozen=True)
class Chat:
    """A conversation in the one shape that chat templates take."""

    messages: list[Message]
    """`role`, `content` (string, None, or a list of {"type": "text", "text"}), and where given `tool_calls`
    ({"type": "function", "function": {"name", "arguments"}}), reasoning under its own name, `tool_call_id`, `name`."""
    learned: list[int]
    """Which messages are to be learned, by place."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    """The columns that it was made of."""
    notes: tuple[str, ...] = ()
    """What of the record has no effect, in words."""


def read_chat(record: Mapping[str, Any], columns: ChatColumns) -> Chat:
    """The conversation of a record, whatever its shape. Raises Unusable."""
    used, values, first_learned = _conversation(record, columns)
    chat = read_messages(values, columns, first_learned)
    if present(system := record.get(columns.system)) and columns.system not in used:
        chat = _with_system(chat, system, columns.system)
    tools = read_tools(record.get(columns.tools), columns.tools)
    kwargs = read_template_kwargs(record.get(columns.template_kwargs), columns.template_kwargs)
    return replace(chat, tools=tools, template_kwargs=kwargs, used=(*used, *columns.extra))


def _conversation(record: Mapping[str, Any], columns: ChatColumns) -> tuple[tuple[str, ...], list[Any], int]:
    """The columns of a conversation, its messages, and the first of them that may be learned."""
    names = CONVERSATION_COLUMNS if columns.may_differ else ()
    for name in dict.fromkeys((columns.messages, *names)):
        if present(record.get(name)):
            return (name,), _message_list(record[name], name), 0
    if names and present(record.get(_PROMPT)) and present(record.get(_COMPLETION)):
        prompt, completion = (maybe_json(record[name]) for name in (_PROMPT, _COMPLETION))
        if isinstance(prompt, str) != isinstance(completion, str):
            raise Unusable("no messages", one_is_text(_PROMPT, _COMPLETION))
        if isinstance(prompt, str):
            raise Unusable(
                "no messages",
                "prompt and completion are texts, to which no chat template is applied: say so with "
                "--prompt-column prompt --response-column completion",
            )
        prompt, completion = _message_list(prompt, _PROMPT), _message_list(completion, _COMPLETION)
        return (_PROMPT, _COMPLETION), [*prompt, *completion], len(prompt)
    if names and record.get("instruction") is not None and record.get("output") is not None:
        return _ALPACA, _alpaca(record), 0
    found = ", ".join(repr(name) for name, value in record.items() if present(value)) or "nothing"
    raise Unusable(
        "no messages",
        f"a list of messages is missing in {columns.messages!r}; it has {found} (--messages-column names the column)",
    )


def one_is_text(prompt: str, response: str) -> str:
    """What is wrong with a record of which one is text and the other a list of messages."""
    return f"of {prompt!r} and {response!r} one is text and the other messages: give two texts or two lists of messages"


def _alpaca(record: Mapping[str, Any]) -> list[Any]:
    """Instruction and input, which a line break joins, as the user's; output as the assistant's."""
    pairs = maybe_json(record.get("history")) or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Unusable("no messages", "history is no list of [instruction, output]")
    question = record["instruction"]
    if present(more := record.get("input")):
        question = "\n".join([text_of(question, "instruction"), text_of(more, "input")])
    pairs = [*pairs, [question, record["output"]]]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(_PAIR, pair, strict=True)]


_PAIR = ("user", "assistant")


def _with_system(chat: Chat, value: Any, name: str) -> Chat:
    text = text_of(value, f"column {name!r}")
    if chat.messages[0]["role"] in ("system", "developer"):
        if chat.messages[0]["content"] == text:
            return chat
        raise Unusable("two system messages", f"column {name!r} and message 1 both give one")
    messages = [{"role": "system", "content": text}, *chat.messages]
    return replace(chat, messages=messages, learned=[number + 1 for number in chat.learned])


def read_messages(values: Sequence[Any], columns: ChatColumns, first_learned: int = 0) -> Chat:
    """Messages, of which the assistant's are learned unless they say otherwise, from `first_learned`. Raises Unusable.

    Messages are {"role", "content", ...}, or {"from", "value"} (ShareGPT).
    """
    messages: list[Message] = []
    learned, notes = [], []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping):
            raise Unusable("no messages", f"message {number} is no object with 'role' and 'content'")
        reader = _MessageReader(value, number, columns.ignored_fields)
        message, is_learned = reader.read()
        if message["role"] != "assistant":
            if is_learned:
                notes.append(f"{message['role']} messages marked to be learned, which only assistant messages are")
        elif is_learned is not False and number > first_learned:
            learned.append(number - 1)
        messages.append(message)
    return Chat(messages, learned, notes=tuple(dict.fromkeys(notes)))


class _MessageReader:
    """Reads one message, field by field, and refuses what is left."""

    def __init__(self, fields: Mapping[str, Any], number: int, ignored: frozenset[str]) -> None:
        self._fields = {name: value for name, value in fields.items() if name not in ignored}
        self._number = number
        self._where = f"message {number}"

    def read(self) -> tuple[Message, bool | None]:
        """The message, and whether it is to be learned; None where it does not say."""
        fields = self._fields
        is_learned = self._learned()
        if "role" not in fields and "from" in fields:
            fields = self._of_sharegpt()
        role = fields.get("role")
        if role == "function" and present(fields.get("name")):  # OpenAI's name for a tool's answer before tools
            role = "tool"
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable("unknown role", f"{self._where} has role {role!r}, not {'/'.join(ROLES)}")
        self._refuse_unknown(fields)
        message: Message = {"role": role, "content": self._content(fields.get("content"))}
        self._add_reasoning(message, fields)
        if calls := self._calls(fields):
            if role != "assistant":
                raise Unusable("tool calls", f"{self._where} has tool calls, but is not the assistant's")
            message["tool_calls"] = calls
        for name in ("tool_call_id", "name"):
            if present(fields.get(name)):
                message[name] = text_of(fields[name], f"{name} of {self._where}")
        if message["content"] is None and not (calls or any(message.get(name) for name in REASONING_FIELDS)):
            raise Unusable("no text", f"content of {self._where} is missing")
        return message, is_learned

    def _of_sharegpt(self) -> dict[str, Any]:
        fields = {("content" if name == "value" else name): value for name, value in self._fields.items()}
        speaker = fields.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise Unusable("unknown role", f"{self._where} is from {speaker!r}, not {'/'.join(_SHAREGPT_ROLES)}")
        fields["role"] = _SHAREGPT_ROLES[speaker]
        if fields["role"] == "function_call":
            calls = parsed(fields.pop("content", None), f"function call of {self._where}")
            fields |= {
                "role": "assistant",
                "content": None,
                "tool_calls": calls if isinstance(calls, list) else [calls],
            }
        return fields

    def _learned(self) -> bool | None:
        """Whether the message is marked to be learned, in any of the common spellings."""
        found = {}
        for name in (*_LEARNED, *_NOT_LEARNED):
            if (value := self._fields.pop(name, None)) is None:
                continue
            flag = truth_of(value)
            if flag is None:
                raise Unusable("unknown weight", f"{name!r} of {self._where} is {value!r}, neither true nor false")
            found[name] = flag != (name in _NOT_LEARNED)
        if len(set(found.values())) > 1:
            raise Unusable("unknown weight", f"{self._where}: {' and '.join(found)} contradict each other")
        return next(iter(found.values()), None)

    def _refuse_unknown(self, fields: Mapping[str, Any]) -> None:
        for name, value in fields.items():
            if name not in _MESSAGE_FIELDS and present(value):
                raise Unusable(
                    f"unknown field {name!r}",
                    f"{self._where} has a field {name!r}, which is not understood: drop it, or let it be ignored with "
                    f"--ignore-fields {name}",
                )

    def _content(self, value: Any) -> Any:
        name = f"content of {self._where}"
        if not isinstance(value, list):
            return None if value is None else text_of(value, name)
        parts = [self._part(_renamed(part), name) for part in value]
        self._part_calls = [maybe_json(part["text"]) for part in parts if part["type"] == _CALL_PART]
        texts = [part for part in parts if part["type"] == "text"]
        self._thoughts = [part["text"] for part in parts if part["type"] == "reasoning"]
        if not texts:
            return None
        return texts[0]["text"] if len(texts) == 1 else texts

    def _part(self, part: Any, name: str) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": text_of(part, name)}
        if not isinstance(part, Mapping):
            raise Unusable("no text", f"{name} holds a {type(part).__name__}, not text")
        given = {key: value for key, value in part.items() if value is not None}
        kind = given.pop("type", "text")
        if kind in _TEXT_PARTS and set(given) == {"text"}:
            return {"type": "text", "text": text_of(given["text"], name)}
        if isinstance(kind, str) and kind in (*_REASONING_PARTS, _CALL_PART) and set(given) == {kind}:
            return {"type": kind if kind == _CALL_PART else "reasoning", "text": text_of(given[kind], name)}
        if kind in _TEXT_PARTS and "text" in given:
            others = ", ".join(repr(key) for key in given if key != "text")
            raise Unusable("unknown field in a content part", f"{name}: a part has {others}, which is not understood")
        raise Unusable(f"content of type {kind!r}", f"{name} has a part of type {kind!r}; only text can be packed")

    _thoughts: Sequence[str] = ()
    _part_calls: Sequence[Any] = ()

    def _add_reasoning(self, message: Message, fields: Mapping[str, Any]) -> None:
        names = [name for name in REASONING_FIELDS if fields.get(name) is not None]
        found = {name: text_of(fields[name], f"{name} of {self._where}") for name in names}
        if self._thoughts:
            found.setdefault(REASONING_FIELDS[0], "\n".join(self._thoughts))
        if not any(found.values()) and message["role"] != "assistant":
            return
        if message["role"] != "assistant":
            raise Unusable("reasoning", f"{self._where} has {', '.join(found)}, but is not the assistant's")
        if len(set(found.values())) > 1:
            raise Unusable("reasoning", f"{self._where} has different texts in {' and '.join(found)}")
        message |= dict(list(found.items())[:1])

    def _calls(self, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        value = maybe_json(fields.get("tool_calls"))
        if present(old := fields.get("function_call")):  # OpenAI's single call before tools
            if present(value):
                raise Unusable("tool calls", f"{self._where} has both 'tool_calls' and 'function_call'")
            value = [maybe_json(old)]
        if self._part_calls:
            if present(value):
                raise Unusable(
                    "tool calls", f"{self._where} has 'tool_calls', and calls among the parts of its content"
                )
            value = list(self._part_calls)
        if not present(value):
            return []
        if not isinstance(value, list):
            raise Unusable("tool calls", f"tool_calls of {self._where} is {type(value).__name__}, not a list")
        return [self._call(call, number) for number, call in enumerate(value, start=1)]

    def _call(self, call: Any, number: int) -> dict[str, Any]:
        where = f"tool call {number} of {self._where}"
        call, function = _function(call, where, {"id", "index"})
        arguments = function.get("arguments")
        if arguments is None:
            function["arguments"] = {}
        elif not isinstance(arguments, str | Mapping):
            raise Unusable("tool calls", f"arguments of {where} is {type(arguments).__name__}, not an object")
        _refuse_keys(function, {"name", "arguments"}, where)
        return {**({"id": call["id"]} if present(call.get("id")) else {}), "type": "function", "function": function}


def _renamed(part: Any) -> Any:
    """A part {"type", "value"}, as LLaMA-Factory writes them, with the value under the name of its type."""
    if not isinstance(part, Mapping) or set(part) != {"type", "value"} or not isinstance(part["type"], str):
        return part
    return {"type": part["type"], part["type"]: part["value"]}


def read_tools(value: Any, name: str = "tools") -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them, of a list or its JSON, of functions with or without a wrapper. Raises Unusable."""
    if not present(value):
        return None
    value = parsed(value, name)
    if not present(value):
        return None
    if not isinstance(value, list):
        raise Unusable("tools", f"{name} is {type(value).__name__}, not a list")
    tools = []
    for number, tool in enumerate(value, start=1):
        where = f"tool {number} of {name}"
        tool = parsed(tool, where)
        wrapper, function = _function(tool, where, set())
        tools.append({**wrapper, "type": "function", "function": function})
    return tools


def read_template_kwargs(value: Any, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Variables for the chat template, of an object or its JSON. Raises Unusable."""
    if not present(value):
        return {}
    value = parsed(value, name)
    if not isinstance(value, Mapping):
        raise Unusable("chat template variables", f"{name} is {type(value).__name__}, not an object")
    if taken := [key for key in value if key in TEMPLATE_VARIABLES]:
        raise Unusable("chat template variables", f"{name} must not give {', '.join(map(repr, taken))}")
    return {key: item for key, item in value.items() if item is not None}


def _function(value: Any, where: str, more: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The wrapper of a function and the function, each a copy; a bare function has an empty wrapper."""
    if not isinstance(value, Mapping):
        raise Unusable("tools", f"{where} is {type(value).__name__}, not an object")
    wrapper = {key: item for key, item in value.items() if present(item)}
    if (kind := wrapper.pop("type", "function")) != "function":
        raise Unusable("tools", f"{where} is of type {kind!r}; only functions can be packed")
    if "function" in wrapper:
        function = maybe_json(wrapper.pop("function"))
        _refuse_keys(wrapper, more, where)
    else:
        function = {key: item for key, item in value.items() if key not in {"type", *more}}
        wrapper = {key: wrapper[key] for key in more & wrapper.keys()}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Unusable("tools", f"{where} is no function with a name")
    return wrapper, {key: item for key, item in function.items() if item is not None}


def _refuse_keys(fields: Iterable[str], known: set[str], where: str) -> None:
    if unknown := [name for name in fields if name not in known]:
        raise Unusable("tools", f"{where} has {', '.join(map(repr, unknown))}, which is not understood")


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content."""
    content = message["content"]
    return [part["text"] for part in content] if isinstance(content, list) else [content or ""]


def _message_list(value: Any, name: str) -> list[Any]:
    value = maybe_json(value)
    if not isinstance(value, list) or not value:
        raise Unusable("no messages", f"a list of messages is missing in {name!r} (--messages-column names the column)")
    return value


def has_later_turns(messages: Sequence[Any]) -> bool:
    """Whether anybody else speaks behind the assistant's first message."""
    speakers = [one.get("role", one.get("from")) for one in messages if isinstance(one, Mapping)]
    is_assistant = [_SHAREGPT_ROLES.get(str(speaker)) in ("assistant", "function_call") for speaker in speakers]
    return True in is_assistant and not all(is_assistant[is_assistant.index(True) :])
