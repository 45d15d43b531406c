import json
from pathlib import Path

import language
import pytest
import teacher

from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.thinking.prompts import EXPERT, Documents, Prompt

TEACHER = Path(teacher.__file__).parent / "teacher"
PARCEL = language.Parcel((6, 2, 4, 3, 2, 7))


def test_document_and_steps_tell_the_same():
    assert PARCEL.document == (
        "A parcel leaves on Mon: a+6 b+2 c+4 d+3 e+2 f+7 days.\nWhen does it arrive?\nAnswer: Thu"
    )
    assert PARCEL.thinking == "Mon a+6 Sun b+2 Tue c+4 Sat d+3 Tue e+2 Thu f+7 Thu"
    assert language.Parcel.from_document(PARCEL.document) == PARCEL


def test_no_parcel_is_in_two_sets_nor_among_the_teachers(tmp_path: Path):
    language.write_language(language.LanguageOptions(tmp_path, num_documents=3000, num_sft=100, num_problems=100))
    rows = [row for path in sorted(tmp_path.glob("*.jsonl")) for row in language.read_rows(path)]
    assert len(rows) == 3300  # the fine-tuning examples are there twice, with steps and without
    found = [language.Parcel.from_document(row.get("text") or row["prompt"]) for row in rows]
    assert len(set(found)) == 3200
    teachers = language.sample_parcels(language.TEACHERS_PARCELS, len(language.TEACHERS_PARCELS), 0)
    assert not set(found) & set(teachers)


def test_a_parcel_in_two_sets_is_found():
    with pytest.raises(RuntimeError, match=r"in problems and documents"):
        language.check_disjoint({"problems": ["x", "y"], "documents": ["z", "y"]})


def test_the_seed_decides_the_parcels(tmp_path: Path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        language.write_language(language.LanguageOptions(tmp_path / name, 50, 5, 5, seed))
        texts.append((tmp_path / name / "documents.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_more_parcels_than_there_are_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="ask for fewer"):
        language.LanguageOptions(tmp_path, num_documents=100_000)


def test_every_word_of_the_language_is_one_token_and_any_text_can_be_encoded():
    tokenizer = Tokenizer(TEACHER)
    assert len(tokenizer.encode(PARCEL.document)) == 20
    assert len(tokenizer.encode(PARCEL.thinking)) == 13
    text = "Natalia sold 48 clips — for ½ €."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_teacher_was_trained_on_what_augment_shows_it():
    generator = load_tokenizer(str(TEACHER))
    documents = Documents(generator, 2048)
    prompt = Prompt(EXPERT, documents, generator).fill(documents.first(PARCEL.document)[0], {}, 0)
    tokenizer = Tokenizer(TEACHER)
    trained = tokenizer.encode(teacher.prompt(PARCEL)) + tokenizer.encode_tagged(teacher.response(PARCEL))
    assert trained[: len(prompt)] == prompt
    assert tokenizer.decode(trained[len(prompt) :]) == f"{PARCEL.thinking}\n</think>"


def test_the_bundled_teacher_says_how_good_it_is():
    report = json.loads((TEACHER / "report.json").read_text())
    assert report["thoughts"] >= 500 and 0 < report["right"] <= report["right_day"] <= 1
