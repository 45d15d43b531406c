import json
import random
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.languages import language
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.filters import cut_to_sentence, is_refusal, judge, script_letters

DEFAULTS = FilterOptions()
DOCUMENT = """Copper conducts heat better than iron does. Its electrons are freer to move, and they carry the energy
from the hot end of a rod to the cold one. A rod of copper that is a metre long and a square centimetre thick carries
about 0.04 watts for every degree between its ends; iron carries a fifth of that. Silver does better still."""
THOUGHT = """The text compares two metals. Why would freer electrons carry heat? In a metal the outer electrons form a
gas that is shared by all atoms, so that a fast one collides far from where it was heated. For the copper rod:
conductivity 400 W/(m K), times the area 1e-4 m^2, over 1 m, gives 400 * 1e-4 = 0.04 W/K, which is the figure in the
text. Iron has about 80, a fifth. So both numbers agree with Fourier's law, $q = -k \\nabla T$, and silver is hardly
worth its price."""
GERMAN = """Der Text vergleicht zwei Metalle, und wir fragen, warum freie Elektronen die Wärme tragen. In einem Metall
ist das Gas der Elektronen nicht an ein Atom gebunden, so dass sich ein schnelles weit von der Stelle stößt, an der es
erwärmt wird. Wenn wir den Stab mit der Formel von Fourier rechnen, ist das Ergebnis die Zahl im Text."""
CHINESE = "文章比较了两种金属的导热性能。为什么自由电子能够传递热量呢？因为金属中的外层电子被所有原子共享。"


def prose(num_words: int, seed: int = 0) -> str:
    """Words in no order, so that nothing repeats."""
    generator = random.Random(seed)
    words = THOUGHT.replace("\n", " ").split()
    return " ".join(generator.choice(words) for _ in range(num_words))


def test_a_thought_is_kept():
    assert judge(DOCUMENT, THOUGHT, DEFAULTS) is None
    assert judge(DOCUMENT, prose(5000), DEFAULTS) is None


@pytest.mark.parametrize("thinking", ["", "  \n", "...", "So it is.", "答案是四。"])
def test_hardly_a_word_is_too_short(thinking: str):
    assert judge(DOCUMENT, thinking, DEFAULTS) == "too_short"


def test_without_a_limit_only_a_thought_without_words_is_too_short():
    options = FilterOptions(min_words=0)
    assert judge(DOCUMENT, "Yes.", options) is None
    assert judge(DOCUMENT, "$$ --- $$", options) == "too_short"


LOOPS = {
    "one word": "Wait. " * 200,
    "one letter": "a" * 3000,
    "one line": "Let me check the conductivity of copper again.\n" * 40,
    "alternating": "Is it 0.04? Yes, it is. But is it? No, wait. Let me see. " * 40,
    "a paragraph": THOUGHT * 4,
    "a changing number": " ".join(
        f"Step {i}: the rod is heated, its electrons move on, and the energy goes along." for i in range(99)
    ),
    "Chinese": CHINESE * 10,
    "formulas": r"\frac{1}{2}+\frac{1}{2}=1, " * 100,
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("cut", [0, 3])
def test_repetition_is_a_loop(loop: str, cut: int):
    document = DOCUMENT + CHINESE
    assert judge(document, loop[: len(loop) - cut], DEFAULTS) == "loop"


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_long_good_thought_that_ends_in_a_loop_is_a_loop(loop: str):
    good = prose(8000)
    assert judge(DOCUMENT, good, DEFAULTS) is None
    assert judge(DOCUMENT, f"{good} {loop}", DEFAULTS) == "loop"
    assert judge(DOCUMENT, f"{good} {loop}", FilterOptions(loop_words=0)) is None


def test_restating_the_result_and_copying_out_a_draft_is_no_loop():
    draft = prose(120, seed=1)
    assert judge(DOCUMENT, f"{prose(300)} {draft} {prose(80, seed=2)} {draft}", DEFAULTS) is None
    table = "\n".join(f"| {i} | {i * i} | {i**3} | {'even' if i % 2 == 0 else 'odd'} |" for i in range(60))
    assert judge(DOCUMENT, table, DEFAULTS) is None


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request. Please ask me something else.",
    "I am very sorry, but I cannot provide an analysis of this text.",
    "Sorry, I'm unable to continue with this, as the text may be harmful to some readers.",
    "As an AI language model, I am not able to simulate an expert's thoughts about this text.",
    "I apologize, but I won't write that. Let us talk about something else instead.",
    "I can't help you with this text. It is not something that I should discuss with anybody.",
    "Hmm, I cannot comply with this request because the text is about weapons of some kind.",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_declining_is_a_refusal(refusal: str):
    assert judge(DOCUMENT, refusal + " I hope for your understanding.", DEFAULTS) == "refusal"
    assert judge(DOCUMENT, refusal + " But then: " + THOUGHT + prose(50), DEFAULTS) is None
    assert judge(DOCUMENT, refusal + " I hope for your understanding.", FilterOptions(max_refusal_words=0)) is None


@pytest.mark.parametrize(
    "thought",
    [
        "I can't see at once why silver should be dearer, so let me compute the ratio of both prices.",
        "I'm sorry for the author: the figure of 0.04 watts is right, yet nobody will believe it.",
        "Sorry, that was wrong. I can write 400 * 1e-4 = 0.04 and the figure is right after all.",
        "I cannot provide a rigorous proof here, but the idea is that electrons carry the heat along.",
        "The nurse says: I'm sorry, but I can't help you. What does she mean by it in this scene?",
        "Unable to help himself, the author compares copper with silver once more and then stops.",
    ],
)
def test_apologies_and_limits_within_a_thought_are_no_refusal(thought: str):
    assert not is_refusal(thought)


def test_a_script_that_neither_the_document_nor_latin_has_is_wrong():
    assert judge(DOCUMENT, CHINESE, DEFAULTS) == "wrong_script"
    assert judge(DOCUMENT, THOUGHT + CHINESE * 4, DEFAULTS) == "wrong_script"
    assert judge(CHINESE, CHINESE[::-1], DEFAULTS) is None
    assert judge(CHINESE, THOUGHT, DEFAULTS) is None
    assert judge(CHINESE, THOUGHT, FilterOptions(scripts=["cjk"])) == "wrong_script"
    assert judge(DOCUMENT, CHINESE, FilterOptions(scripts=["cjk"])) is None
    assert judge(DOCUMENT, CHINESE, FilterOptions(max_foreign_share=1)) is None


def test_quotations_and_mathematics_are_in_no_wrong_script():
    quoting = THOUGHT + " In Russian copper is медь, in Chinese 铜, and the Greeks said χαλκός."
    assert judge(DOCUMENT, quoting, DEFAULTS) is None
    symbols = "α = β + γ, so Δ ≤ ½ ε; ∑ 𝑥² ∈ ℝ, λ → ∞, θ ≈ π/2, and ω × ρ = σ"
    assert judge(DOCUMENT, symbols, DEFAULTS) is None
    assert script_letters(symbols).keys() == {"latin"}


def test_scripts_are_recognized_by_their_letters():
    assert script_letters("ab é ﬁ 12 — Ω") == {"latin": 4}
    assert script_letters("これはテスト漢字") == {"cjk": 8}
    assert script_letters("слово λόγος कमल 한글") == {"cyrillic": 5, "greek": 5, "devanagari": 3, "hangul": 2}


def test_the_language_of_whole_paragraphs_is_recognized():
    assert language(THOUGHT) == "en"
    assert language(GERMAN) == "de"
    assert language("3 + 4 = 7") is None
    assert judge(DOCUMENT, GERMAN, DEFAULTS) is None
    assert judge(DOCUMENT, GERMAN, FilterOptions(languages=["en"])) == "wrong_language"
    assert judge(DOCUMENT, GERMAN, FilterOptions(languages=["en", "de"])) is None
    assert judge(DOCUMENT, prose(30), FilterOptions(languages=["en"])) is None


def test_a_language_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"--filters\.languages english: is none of .* en "):
        FilterOptions(languages=["en", "english"])


def test_the_document_again_is_a_copy():
    assert judge(DOCUMENT, DOCUMENT, DEFAULTS) == "copy"
    assert judge(DOCUMENT, "The text says: " + DOCUMENT.upper().replace("\n", " "), DEFAULTS) == "copy"
    assert judge(THOUGHT + DOCUMENT + THOUGHT[::-1], DOCUMENT, DEFAULTS) == "copy"
    assert judge(DOCUMENT, DOCUMENT + THOUGHT, DEFAULTS) is None
    assert judge(DOCUMENT, DOCUMENT, FilterOptions(max_copied_share=1)) is None


def test_options_are_the_same_after_json():
    options = FilterOptions(scripts=["cjk", "latin"], languages=["de"])
    content = asdict(options)
    assert json.loads(json.dumps(content)) == content
    assert FilterOptions(**content) == options


def test_limits_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"--filters\.min-words -1: must be 0 or more"):
        FilterOptions(min_words=-1)
    with pytest.raises(UserError, match=r"--filters\.max-copied-share 1\.5: must be from 0 to 1"):
        FilterOptions(max_copied_share=1.5)


CUTS = [
    ("Copper is a metal. Iron i", "Copper is a metal."),
    ("Copper is a metal", ""),
    ("", ""),
    ("Dr. Smith came at 3.15 p.m. and left. He saw Mr.", "Dr. Smith came at 3.15 p.m. and left."),
    ("It falls, e.g.", ""),
    ("It is so. See Fig. 3 for more. Then we", "It is so. See Fig. 3 for more."),
    ('She said "Yes." Then', 'She said "Yes."'),
    ("**Done.** Next", "**Done.**"),
    ("So 4! (Really?) And", "So 4! (Really?)"),
    ("It is so.\n\n2.", "It is so.\n\n"),
    ("It is so. It is 3.", "It is so."),
    ("It is so. It is 3. Th", "It is so. It is 3. "),
    ("1. Copper\n2. Iron\n3. Sil", "1. Copper\n2. Iron\n"),
    ("Metals:\n- copper, which\n  is red\n- ir", ""),
    ("It is so.\n\n- first:\n  - copper and", "It is so.\n\n"),
    ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3", "| a | b |\n|---|---|\n| 1 | 2 |\n"),
    ("x = 3\n\nSo y = 4\n\n## Next step\n\nIt", "x = 3\n\nSo y = 4\n\n"),
    ("It is so. As code:\n```py\nx = 1. \n\ny", "It is so."),
    ("It is so:\n```py\nx = 1.\n```\nThen", "It is so:\n```py\nx = 1.\n```"),
    ("It is so. Thus $$ x = 3. And", "It is so."),
    ("It is so. Thus\n$$x = 3$$\n\nThen", "It is so. Thus\n$$x = 3$$\n\n"),
    ("It is so. Thus\n$$x = 3$$\nwhere", "It is so."),
    (r"It is so. \begin{align} x &= 1. \\ y", "It is so."),
    (r"It is so: \[ x = 1. \text{ Yes. } \] and", ""),
    ("今天很好。我们去", "今天很好。"),
    ("他说：「好！」然后", "他说：「好！」"),
]


@pytest.mark.parametrize(("text", "expected"), CUTS)
def test_a_cut_thought_ends_with_its_last_whole_sentence(text: str, expected: str):
    assert cut_to_sentence(text) == expected


PIECES = [
    "It is so.",
    "Why?",
    "e.g.",
    "Fig.",
    "3.14",
    "x",
    " ",
    "\n",
    "\n\n",
    "- item",
    "1. ",
    "$$",
    "```",
    "\\[",
    "\\]",
]
PIECES += [
    "\\begin{a}",
    "\\end{a}",
    "好。",
    "」",
    "| a |",
    ":",
    ",",
    ".",
    "...",
    '"',
    "**",
    "# Head",
    "J.",
    "~~~",
    ")",
    "\t",
]


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=40))
@example("a.\\[2pt] b. c")
@example("x\n\n \n")
def test_the_cut_is_a_prefix_and_cutting_again_changes_nothing(text: str):
    cut = cut_to_sentence(text)
    assert text.startswith(cut)
    assert cut_to_sentence(cut) == cut


def test_every_cut_of_a_thought_ends_with_a_sentence_of_it():
    ends = [cut_to_sentence(THOUGHT[:length]) for length in range(len(THOUGHT) + 1)]
    assert len(set(ends)) == 7  # one of them empty: five full stops and a question mark
    assert all(end == "" or end[-1] in ".?" for end in ends)
    assert ends == sorted(ends, key=len)
