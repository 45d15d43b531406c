"""Annotations by a language model: prompts, answers, and a job whose server is asked once about every document."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus_files import output_bytes, sentence, write_jsonl
from unruly_server import MODEL, UnrulyServer

from megatron_tpt.corpus.annotate.judge import Judge
from megatron_tpt.corpus.curate import curate
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import Fault, UserError
from megatron_tpt.records import read_records


class JudgeServer(UnrulyServer):
    """Its model answers with the number of words of the text in the prompt, after some thinking; of texts with "odd"
    it does not know what to say."""

    def _text(self, prompt: Any) -> str:
        text = re.search(r"<<(.*)>>", prompt, re.DOTALL)
        assert text is not None
        return "No idea." if "odd" in text[1] else f"<think>Is it 3 or 4?</think>It is {len(text[1].split())}."


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    server.start()
    yield server
    server.stop()


def options_for(folder: Path, server: UnrulyServer, **changes: Any) -> CurateOptions:
    (folder / "length.yaml").write_text("prompt: 'How long? <<{text}>>'\nminimum: 0\nmaximum: 50\n")
    rows = [{"text": sentence(number, 5 + number)} for number in range(9)]
    rows += [{"text": rows[2]["text"]}, {"text": "odd " + sentence(40, 7)}, {"text": sentence(41, 70)}]
    path = write_jsonl(folder / "raw.jsonl", rows)
    return dataclasses.replace(
        CurateOptions(
            [f"all={path}"],
            folder / "curated",
            annotate=[],
            judge=[f"length={folder / 'length.yaml'}"],
            model=MODEL,
            engine="endpoint",
            endpoints=[server.url],
            api="chat",
            rows_per_shard=4,
            num_workers=1,
        ),
        **changes,
    )


def test_every_document_that_is_kept_is_asked_about_once(tmp_path: Path, server: JudgeServer) -> None:
    report = curate(options_for(tmp_path, server))
    records = list(read_records(sorted((tmp_path / "curated").glob("part-*"))))
    lengths = [record.meta["length"] for record in records]
    assert lengths == [5, 6, 7, 8, 9, 10, 11, 12, 13, None, None]
    assert len(server.bodies) == 11  # not about the duplicate
    assert all(body["temperature"] == 0 for body in server.bodies)
    assert report.judging == {"length: unanswered": 2}  # one said nothing, one more than the maximum
    assert "| length: unanswered | 2 |" in (tmp_path / "curated/report.md").read_text()


def test_a_job_that_stops_asks_again_only_about_the_shards_in_flight(tmp_path: Path, server: JudgeServer) -> None:
    expected = options_for(tmp_path, server, output=tmp_path / "expected")
    curate(expected)
    num_asked = len(server.bodies)
    server.refuses = lambda body: (401, "no") if "odd" in json.dumps(body) else None
    options = options_for(tmp_path, server)
    with pytest.raises((UserError, Fault)):
        curate(options)
    server.refuses, server.bodies = (lambda body: None), []
    curate(options)
    assert output_bytes(options.output) == output_bytes(expected.output)
    assert 0 < len(server.bodies) < num_asked
    (tmp_path / "length.yaml").write_text("prompt: 'How long? <<{text}>>'\nminimum: 0\nmaximum: 60\n")
    with pytest.raises(UserError, match=r"judge\.length\.maximum was 50"):
        curate(options)


@pytest.mark.parametrize(
    ("text", "label", "number"),
    [
        ("math", "math", None),
        ("<think>Not code.</think> The field is **Math**.", "math", None),
        ("It could be code or math; I settle for code.", "code", None),
        ("mathematics", None, None),
        ("Score: 4", None, 4.0),
        ("From 0 to 5: 3.5.", None, 3.5),
        ("7", None, None),
        ("", None, None),
    ],
)
def test_the_last_possible_answer_counts(text: str, label: str | None, number: float | None) -> None:
    assert Judge("{text}", labels=["math", "code"]).read_answer(text) == label
    assert Judge("{text}", minimum=0, maximum=5).read_answer(text) == number


def test_texts_go_where_they_belong_and_are_not_searched_for_places() -> None:
    document = Document("q {answer}\na", "q {answer}", "a", "", True)
    assert Judge("<{question}> <{answer}>", labels=["x"]).prompt_for(document) == "<q {answer}> <a>"
    assert Judge("{text}", labels=["x"], max_characters=3).prompt_for(document) == "q {"


def test_the_judges_of_the_package_can_be_read_and_mistakes_are_named(tmp_path: Path) -> None:
    assert Judge.read("domain").labels == ["math", "code", "science", "general"]
    assert Judge.read("reasoning").maximum == 5
    path = tmp_path / "judge.yaml"
    for text, message in [
        ("prompt: '{text}'\n", "either labels, or minimum and maximum"),
        ("prompt: '{text}'\nlabels: [a]\nminimum: 1\n", "either labels, or minimum and maximum"),
        ("prompt: '{text}'\nminimum: 2\nmaximum: 1\n", "minimum 2.0 is above maximum 1.0"),
        ("prompt: '{text}'\nlabels: [a, A]\n", "two differ in case alone"),
        ("prompt: '{text}'\nlabels: [a, ' ']\n", "labels: one is empty"),
        ("prompt: '{document}'\nlabels: [a]\n", r"prompt: write \{text\}.*found \['document'\]"),
        ("labels: [a]\n", "prompt is missing"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Judge.read(str(path))
    with pytest.raises(UserError, match="give a YAML file, or one of domain, reasoning"):
        Judge.read("domian")
