"""Arrays and objects over several lines become lines of JSON, wherever the chunks of the file end."""

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tpt.records.json_files import as_lines

TEXT = st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "{", "]", "},{", "\n", ",", "\\u0022"])
VALUE = st.recursive(
    TEXT | st.none() | st.integers() | st.booleans(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUE, max_size=3), max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    objects=OBJECTS,
    indent=st.sampled_from([None, 0, 2]),
    layout=st.sampled_from(["array", "objects", "lines"]),
    before=st.sampled_from(["", "\ufeff", " \n"]),
    ascii=st.booleans(),
    chunk_bytes=st.integers(1, 9) | st.just(10_000),
)
def test_the_records_are_the_same_in_every_layout_and_however_it_is_read(
    objects: list[dict[str, Any]], indent: int | None, layout: str, before: str, ascii: bool, chunk_bytes: int
) -> None:
    if layout == "array":
        text = json.dumps(objects, indent=indent, ensure_ascii=ascii)
    else:
        # An empty object in front, {}, is a whole line: then the file is lines of JSON.
        objects = [{"first": 1, "more": 2}, *objects]
        texts = [json.dumps(one, indent=indent if layout == "objects" else None, ensure_ascii=ascii) for one in objects]
        text = "\n".join(texts)
    content = (before + text + "\n").encode(errors="surrogatepass")
    chunks = (bytes(chunk) for chunk in itertools.batched(content, chunk_bytes))
    lines = b"".join(as_lines(chunks)).split(b"\n")
    records = [json.loads(line.decode(errors="surrogatepass")) for line in lines if line.strip()]
    assert records == objects
    if layout == "array":
        assert [bool(line.strip()) for line in lines[: len(objects)]] == [True] * len(objects)  # numbers are places
