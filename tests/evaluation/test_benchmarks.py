"""The benchmarks of this package, and files of a user's own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import Arm
from megatron_tpt.evaluation.asking import Evaluation, render_prompts
from megatron_tpt.evaluation.benchmark import FOLDER, names
from megatron_tpt.evaluation.choices import continuations
from megatron_tpt.evaluation.evaluate import evaluate
from megatron_tpt.evaluation.options import EvaluateOptions, parse_benchmarks
from megatron_tpt.evaluation.problems import Problem, ProblemSet, read_problem_set, read_problems
from megatron_tpt.evaluation.samples import Store
from megatron_tpt.grading import Grader, Item

SUITES = {
    "tpt-base": ["gsm8k-base", "math-base", "boolq", "mmlu-base", "mmlu-pro-base"],
    "tpt-reasoning": ["math500", "aime24", "aime25", "hmmt25", "gsm8k", "humaneval", "livecodebench", "gpqa-diamond",
                      "mmlu-pro", "jeebench"],
}  # fmt: skip


def parsed(*arguments: str) -> list[EvaluateOptions]:
    return parse_benchmarks(["--model", "m", "--output", "out", *arguments])


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def described() -> dict[str, Any]:
    """What the files of this package say, by name."""
    return {path.stem: load_yaml(path)[0] for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("name", names())
def test_every_benchmark_is_complete_and_says_where_its_data_are(name: str) -> None:
    for run in parsed("--benchmark", name):
        assert run.fetch and run.data_file and (run.data is None or str(run.data).startswith("hf://"))
        with pytest.raises(UserError, match=re.escape(run.fetch.split()[0])):
            read_problems(run, Path("/nowhere"))


def test_the_page_names_every_file_of_a_data_folder() -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    files = {content.get(key) for content in described().values() for key in ("data_file", "few_shot_file")} - {None}
    assert sorted(file for file in files if f"`{file}`" not in page) == []


@pytest.mark.parametrize("name", names())
def test_every_option_of_a_benchmark_counts(name: str) -> None:
    assert [run.ignored() for run in parsed("--benchmark", name, "--data-dir", "data")] == [
        [] for _ in parsed("--benchmark", name)
    ]


@pytest.mark.parametrize(
    ("arguments", "ignored"),
    [
        ("--num-shots 3 --shot-begin Q --shuffle-choices", "--shuffle-choices --num-shots --shot-begin"),
        ("--labels-column a --choice-labels a b", "--choice-labels --labels-column"),
        ("--normalize-by characters --likelihood-of rest --blank ?", "--likelihood-of --normalize-by --blank"),
        ("--code-time-limit-s 4 --code-prefix-column prompt", "--code-prefix-column --code-time-limit-s"),
        ("--scoring log-likelihood --answer-type choice --choice-texts a b --temperature 0.6 --max-new-tokens 7",
         "--temperature --max-new-tokens"),
        ("--data-dir d --top-p 0.9", "--top-p --data-dir"),
        ("--num-engines 4", "--num-engines"),
        ("--engine transformers --tensor-parallel-size 4", "--tensor-parallel-size"),
        ("--temperature 0.6 --top-p 0.9 --stop x --num-samples 2 --dtype float32 --tensor-parallel-size 4", ""),
    ],
)  # fmt: skip
def test_options_that_change_nothing_are_named(arguments: str, ignored: str) -> None:
    [run] = parsed("--data", "p.jsonl", *arguments.split())
    assert run.ignored() == ignored.split()


def test_options_without_effect_are_named_once_for_all_that_ignore_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--benchmark", "gsm8k-base", "boolq", "arc-easy", "--temperature", "0.6", "--documents", "d.jsonl"]
    with pytest.raises(UserError, match="is missing"):  # nothing is there
        evaluate(parsed(*arguments, "--data-dir", str(tmp_path)))
    [line] = caplog.messages
    assert line == "boolq, arc-easy: without effect here: --temperature"


def test_the_likeliest_option_is_read_whatever_the_outputs_of_others_end_with() -> None:
    options = ("--scoring", "log-likelihood", "--choice-texts", "a", "b", "--answer-type", "choice")
    [run] = parsed("--data", "p.jsonl", *options, "--answer-pattern", "ANSWER: (.)", "--stop", "(", ")")
    assert Grader(run.rules()).grade(Item("(B)", "B", ("a", "b"))).correct


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--name ../../outside", "--name '../../outside': is that of a folder in the output, without slashes"),
        ("--name /abs", "without slashes"),
        ("--name ..", "without slashes"),
        ("--stop= ", "--stop: an empty text would end every answer at once"),
        ("--choice-texts a b c d e f g h i j k", "--choice-texts: 11 given; give 2 to 10 options"),
        ("--choice-columns a", "--choice-columns: 1 given; give 2 to 10 options"),
        ("--rescore --num-tasks 4", "--rescore grades in this process: omit --num-tasks and --executor"),
        ("--rescore --executor slurm", "--rescore grades in this process"),
        ("--task 3", r"--task 3: there are 1 \(--num-tasks\), from 0 on"),
        ("--num-tasks 2 --task -1", "--task -1: there are 2"),
    ],
)
def test_options_that_lead_nowhere_are_refused(arguments: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parsed("--data", "p.jsonl", *arguments.split())


def test_suites_have_the_papers_settings() -> None:
    for suite, members in SUITES.items():
        assert [run.title for run in parsed("--benchmark", suite)] == members
    for run in parsed("--benchmark", "tpt-reasoning"):
        assert (run.temperature, run.top_p, run.max_new_tokens, run.chat) == (0.6, 0.95, 32768, True)
    samples = {run.title: run.num_samples for run in parsed("--benchmark", "tpt-reasoning")}
    assert [samples[name] for name in ("aime24", "aime25", "livecodebench", "gpqa-diamond", "math500")] == [
        64, 64, 16, 8, 4
    ]  # fmt: skip
    shots = {run.title: run.num_shots for run in parsed("--benchmark", "tpt-base")}
    assert (shots["gsm8k-base"], shots["mmlu-base"], shots["mmlu-pro-base"], shots["boolq"]) == (5, 2, 2, None)
    assert {run.max_new_tokens for run in parsed("--benchmark", "tpt-base")} - {2048} == {1024}  # of the likelihoods
    assert all(run.temperature == 0 and not run.chat for run in parsed("--benchmark", "tpt-base"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--limit 3 --seed 4 --num-samples 4 --temperature 0.60", ""),
        ("--num-samples 1", ", with other --num-samples"),
        ("--temperature 0.5 --num-samples 8", ", with other --num-samples, --temperature"),
        ("--prompt-template {problem}", ", with other --prompt-template"),
        ("--few-shot examples.txt", ", with other --few-shot"),
    ],
)
def test_published_figures_name_the_settings_that_differ(arguments: str, words: str) -> None:
    [run] = parsed("--benchmark", "math500", *arguments.split())
    assert (run.paper[f"TPT-8B after SFT{words}"], run.paper_problems) == (82.4, 500)


def test_published_figures_of_ones_own_and_options_without_effect_change_nothing() -> None:
    [run] = parsed("--benchmark", "boolq", "--temperature", "0.6")
    assert run.paper["TPT-8B from scratch"] == 75.0
    files = described()
    for content in files.values():
        assert ("paper" in content) == ("paper_problems" in content) == ("paper_source" in content)


def test_published_figures_name_their_model_in_full() -> None:
    """They are rows of a table: what is relative to another figure of its benchmark would be of several models."""
    names = {name for content in described().values() for name in content.get("paper", ())}
    assert names and all(re.search(r"\d+B\b|TinyLlama", name) for name in names)
    assert not [name for name in names if "the same" in name]


def test_base_models_are_read_from_their_first_answer_and_others_from_their_last() -> None:
    firsts = {
        run.title: run.rules().reading.first
        for suite in ("tpt-base", "front-loading-base", "tpt-reasoning", "front-loading-sft")
        for run in parsed("--benchmark", suite)
        if run.scoring == "generate"
    }
    assert {title for title, first in firsts.items() if first} == {title for title in firsts if title.endswith("-base")}


def test_options_win_over_a_benchmark_and_a_suite_over_its_members(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("benchmark: [math500, aime24]\nnum_samples: 2\nlimit: 5\n")
    runs = parsed("--benchmark", str(tmp_path / "mine.yaml"), "--limit", "3")
    assert [(run.title, run.num_samples, run.limit, run.temperature) for run in runs] == [
        ("math500", 2, 3, 0.6),
        ("aime24", 2, 3, 0.6),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("promt_column: q\n", r"mine.yaml:1: promt_column: unknown; did you mean prompt_column\?"),
        ("num_samples: 0\n", "num_samples=?.* 0: must be 1 or more|num_samples 0|num_samples=0 must be 1 or more"),
        ("benchmark: [math501]\n", "--benchmark math501: unknown; did you mean math500"),
        ("- 1\n", "a benchmark is a list of options"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_place(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        parsed("--benchmark", str(tmp_path / "mine.yaml"))


def test_a_suite_without_benchmarks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text("benchmark: []\n")
    with pytest.raises(UserError, match=r"none\.yaml: names no benchmark; name some"):
        parsed("--benchmark", str(tmp_path / "none.yaml"))


def test_a_row_without_the_blank_is_refused(tmp_path: Path) -> None:
    options = ("--scoring", "log-likelihood", "--likelihood-of", "rest", "--choice-texts", "cat", "dog")
    for sentence in ("no blank here", "nothing after the _ "):
        data = write_rows(tmp_path / "a.jsonl", {"prompt": sentence, "answer": "A"})
        [run] = parsed("--data", str(data), *options, "--answer-type", "choice")
        with pytest.raises(UserError, match=r"a\.jsonl:1: --likelihood-of rest is of the text after the blank '_'"):
            read_problems(run)


def test_a_suite_within_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"benchmark: ['{tmp_path / 'a.yaml'}']\n")
    with pytest.raises(UserError, match="within itself"):
        parsed("--benchmark", str(tmp_path / "a.yaml"))


def test_few_shot_examples_are_the_first_ones_of_the_group(tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "d.jsonl", {"q": "1+1?", "s": "sums", "answer": "2"}, {"q": "2*2?", "s": "p", "answer": "4"}
    )
    rows = [{"s": group, "q": f"{group} {i}", "a": i} for i in range(3) for group in ("sums", "p")]
    write_rows(tmp_path / "shots.jsonl", *rows)
    options = EvaluateOptions(
        model=["m"], output=tmp_path, data=data, few_shot=tmp_path / "shots.jsonl", shot_group="s", num_shots=2,
        shot_template="Q: {q} A: {a}\n", prompt_template="Q: {q} A:",
    )  # fmt: skip
    first, second = read_problems(options)
    assert first.prompt == "Q: sums 0 A: 0\nQ: sums 1 A: 1\nQ: 1+1? A:"
    assert second.prompt == "Q: p 0 A: 0\nQ: p 1 A: 1\nQ: 2*2? A:"
    with pytest.raises(UserError, match="the text has only 3 examples"):
        read_problems(EvaluateOptions(**vars(options) | {"num_shots": 4}))


def test_a_text_of_examples_is_cut_where_each_begins() -> None:
    texts = {name: (FOLDER / "shots" / name).read_text() for name in ("gsm8k_cot.txt", "math_minerva.txt")}
    assert texts["gsm8k_cot.txt"].count("Q: ") == 8 and texts["math_minerva.txt"].count("Problem:\n") == 4


def test_options_are_shuffled_by_the_problem_and_the_right_one_is_followed(tmp_path: Path) -> None:
    rows = [{"q": f"Which? {i}", "right": "R", "w1": "X", "w2": "Y", "w3": "Z"} for i in range(20)]
    options = EvaluateOptions(
        model=["m"], output=tmp_path, data=write_rows(tmp_path / "d.jsonl", *rows), prompt_template="{q}\n{choices}",
        choice_columns=["right", "w1", "w2", "w3"], answer_column="right", shuffle_choices=True, answer_type="choice",
    )  # fmt: skip
    problems = read_problems(options)
    places = [problem.choices.index("R") for problem in problems]
    assert set(places) == {0, 1, 2, 3}
    grader = Grader(options.rules())
    for problem, place in zip(problems, places, strict=True):
        assert f"({'ABCD'[place]}) R" in problem.prompt
        assert grader.grade(Item(f"So \\boxed{{{'ABCD'[place]}}}.", problem.answer, problem.choices)).correct
    assert problems == read_problems(options)
    other = read_problems(EvaluateOptions(**vars(options) | {"seed": 1}))
    assert [problem.choices for problem in other] != [problem.choices for problem in problems]

    rows = [{"q": f"Which? {i}", "right": "B", "w1": "A", "w2": "C", "w3": "D"} for i in range(20)]
    write_rows(tmp_path / "d.jsonl", *rows)  # options that look like letters
    for problem in read_problems(options):
        assert problem.choices["ABCD".index(problem.answer)] == "B"


def test_an_answer_by_number_is_followed_through_the_shuffle(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"q": f"{i}?", "options": ["1", "2", "3", "4"], "answer": 3} for i in range(9)]
    options = EvaluateOptions(
        model=["m"], output=tmp_path, data=write_rows(tmp_path / "d.jsonl", *rows), prompt_column="q",
        choices_column="options", shuffle_choices=True, answer_type="choice",
    )  # fmt: skip
    by_template = EvaluateOptions(**vars(options) | {"answer_template": "{text}"})
    for problem in read_problems(options):
        assert problem.choices["ABCD".index(problem.answer)] == "4"
    write_rows(tmp_path / "d.jsonl", *(row | {"answer": "3", "text": "2"} for row in rows))
    for by_text, by_other_text in zip(read_problems(options), read_problems(by_template), strict=True):
        assert by_text.choices["ABCD".index(by_text.answer)] == "3"
        assert by_other_text.choices["ABCD".index(by_other_text.answer)] == "2"
    for answer, message in ((4, "no number of an option, 0 to 3"), ("A", "text of one option, or its number from 0")):
        write_rows(tmp_path / "d.jsonl", rows[0] | {"answer": answer})
        with pytest.raises(UserError, match=message):
            read_problems(options)


@pytest.mark.parametrize(
    ("answer", "texts", "message"),
    [
        (
            "C",
            ["C", "D", "E", "A"],
            r"d\.jsonl:1: the answer 'C' is the letter of option 3 and the text of option 1; give",
        ),
        ("c", ["c", "d", "e", "a"], "the answer 'c' is the letter of option 3"),
        ("C", ["A", "B", "C", "D"], None),
        ("E", ["C", "D", "E", "A"], None),
        ("C", ["red", "blue", "green"], None),
        (2, ["C", "D", "E", "A"], None),
    ],
)
def test_an_answer_that_is_the_letter_of_one_option_and_the_text_of_another_is_refused(
    tmp_path: Path, answer: Any, texts: list[str], message: str | None
) -> None:
    data = write_rows(tmp_path / "d.jsonl", {"prompt": "?", "options": texts, "answer": answer})
    options = EvaluateOptions(model=["m"], output=tmp_path, data=data, choices_column="options", answer_type="choice")
    by_label = EvaluateOptions(**vars(options) | {"choice_labels": list("ABCDE")[: len(texts)]})
    if message is None:
        assert read_problems(options)[0].answer == answer
    else:
        with pytest.raises(UserError, match=message):
            read_problems(options)
        assert read_problems(EvaluateOptions(**vars(options) | {"answer_type": "exact"}))[0].answer == answer
    if answer == "C":
        assert read_problems(by_label)[0].answer == "C"


def test_labels_name_the_options(tmp_path: Path) -> None:
    row = {"q": "?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    options = EvaluateOptions(
        model=["m"], output=tmp_path, data=write_rows(tmp_path / "d.jsonl", row), prompt_column="q",
        choices_column="choices.text", labels_column="choices.label", answer_column="answerKey", answer_type="choice",
    )  # fmt: skip
    [problem] = read_problems(options)
    assert (problem.answer, problem.choices) == ("C", ("a", "b", "c"))
    with pytest.raises(UserError, match="none of the labels 1, 2, 3"):
        write_rows(tmp_path / "d.jsonl", row | {"answerKey": "D"})
        read_problems(options)


def test_what_is_scored_is_the_option_its_letter_or_the_rest() -> None:
    arc, mmlu, winogrande = (parsed("--benchmark", name)[0] for name in ("arc-easy", "mmlu", "winogrande"))
    assert continuations(arc, "Q\nAnswer:", ["red", "blue"]) == [("Q\nAnswer:", " red"), ("Q\nAnswer:", " blue")]
    assert continuations(mmlu, "Q\nAnswer:", ["red", "blue"]) == [("Q\nAnswer:", " A"), ("Q\nAnswer:", " B")]
    assert continuations(winogrande, "Ann met _ at noon.", ["Bob", "Eve"]) == [
        ("Ann met Bob", " at noon."),
        ("Ann met Eve", " at noon."),
    ]


def test_the_begin_token_stands_once_before_a_prompt(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        chat_template="{{ bos_token }}{{ messages[0]['content'] }}",
    )  # fmt: skip
    for given, texts in (([], ["The ferry"]), (["--chat"], ["<|endoftext|>The ferry"])):
        for scoring in ("generate", "log-likelihood"):
            words = ["--data", "d", "--choice-texts", "no", "yes", "--answer-type", "boolean", "--scoring", scoring]
            [options] = parsed(*words, *given)
            problems = ProblemSet([Problem("1", "The ferry", True, "d:1", ("no", "yes"))], "d", "")
            assert render_prompts(tokenizer, ["The ferry"], options) == texts
            arm = Arm("m", "m", Path("m"))
            evaluation = Evaluation(arm, options, problems, Store(tmp_path), tokenizer, texts)
            ids = (
                evaluation.encode(texts[0])
                if scoring == "generate"
                else list(evaluation.scoring_requests(0)[0].context)
            )
            assert ids[0] == 0 and ids.count(0) == 1 and tokenizer.decode(ids[1:]) == "The ferry"


def test_rows_of_the_shape_on_the_hub_are_read(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "gsm8k": {"question": "1+1?", "answer": "Two.\n#### 2"},
        "gpqa-diamond": {"Record ID": "r", "Question": "?", "Correct Answer": "a", "Incorrect Answer 1": "b",
                         "Incorrect Answer 2": "c", "Incorrect Answer 3": "d"},
        "hellaswag": {"ind": 4, "activity_label": "Cooking", "ctx": "He", "endings": list("abcd"), "label": "2"},
        "winogrande": {"sentence": "Ann met _ at noon.", "option1": "Bob", "option2": "Eve", "answer": "2"},
        "svamp": {"ID": "c-1", "Body": "Two.", "Question": "And one?", "Answer": "3.0"},
        "mbpp": {"task_id": 1, "text": "Add.", "test_setup_code": "",
                 "test_list": ["assert f(1) == 2", "assert f(2) == 3"]},
        "jeebench": {"question": "?", "gold": "AC"},
        "ifeval": {"key": 1000, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"],
                   "kwargs": [{"num_words": None}]},
    }  # fmt: skip
    for name, row in rows.items():
        [run] = parsed("--benchmark", name)
        assert run.data_file is not None
        write_rows(tmp_path / run.data_file, row)
        found = read_problem_set(run, tmp_path)
        assert Grader(run.rules()).reference(found.problems[0].answer, found.problems[0].choices) is not None
        assert found.data_sha256.startswith("sha256:")
    assert "assert f(1) == 2\nassert f(2) == 3" in read_problems(parsed("--benchmark", "mbpp")[0], tmp_path)[0].prompt
