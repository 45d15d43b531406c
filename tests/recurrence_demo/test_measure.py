import pytest
import torch
from measure import SolvedProblems

VOCAB_SIZE, EOS = 12, 11
# Walks as token ids, without the response: of 1, 3 and 2 doors.
PROMPTS = ([0, 5], [1, 5, 6, 7], [2, 6, 6])


def packed_row(length: int) -> dict[str, torch.Tensor]:
    """The prompts in one row, each with the response 3 and the end, as fine-tuning packs them: [1, length]."""
    texts = [[*prompt, 3, EOS] for prompt in PROMPTS]
    tokens, segments, positions, learned = [], [], [], []
    for number, text in enumerate(texts, start=1):
        tokens += text
        segments += [number] * len(text)
        positions += range(len(text))
        learned += [0.0] * (len(text) - 2) + [1.0, 1.0]
    padding = length + 1 - len(tokens)
    tokens, segments = tokens + [EOS] * padding, segments + [0] * padding
    positions, learned = positions + [0] * padding, learned + [0.0] * padding
    row = {
        "tokens": tokens[:-1], "labels": tokens[1:], "segment_ids": segments[:-1], "position_ids": positions[:-1],
        "loss_mask": learned[1:],
    }  # fmt: skip
    return {name: torch.tensor([values]) for name, values in row.items()}


def counts(batch: dict[str, torch.Tensor], wrong: list[int]) -> dict[str, float]:
    """Those of logits that are right but at some places of the row."""
    logits = torch.nn.functional.one_hot(batch["labels"], VOCAB_SIZE).float() * 10
    for place in wrong:
        logits[0, place, 4] = 20.0
    objective = SolvedProblems(4)
    _, sums = objective(logits, batch)
    assert tuple(sums) == objective.sum_names
    assert sums["tokens"] == len(PROMPTS)
    return objective.metrics({name: float(value) for name, value in sums.items()})


@pytest.mark.parametrize("length", [14, 20])
def test_a_problem_is_solved_when_the_response_is_the_most_likely_token(length: int) -> None:
    batch = packed_row(length)
    assert batch["loss_mask"].sum() == 2 * len(PROMPTS)
    assert counts(batch, []) == {"loss": pytest.approx(0.0, abs=1e-3), "all": 1.0, "1": 1.0, "2": 1.0, "3": 1.0}
    # The response of the first walk is the label at place 1, that of the second one at 7.
    assert (found := counts(batch, [1]))["1"] == 0.0 and found["2"] == found["3"] == 1.0
    assert (found := counts(batch, [7]))["3"] == 0.0 and found["all"] == pytest.approx(2 / 3)


def test_prompts_ends_and_padding_do_not_count() -> None:
    batch = packed_row(20)
    assert counts(batch, [0, 2, 3, 5, 8, 19])["all"] == 1.0


def test_rows_without_loss_hold_no_problem() -> None:
    """Those that fill the last batch of a validation."""
    row = packed_row(20)
    empty = row | {"loss_mask": torch.zeros_like(row["loss_mask"])}
    both = {name: torch.cat([row[name], empty[name]]) for name in row}
    logits = torch.nn.functional.one_hot(both["labels"], VOCAB_SIZE).float()
    _, sums = SolvedProblems(4)(logits, both)
    assert sum(float(sums[f"asked/{doors}"]) for doors in range(1, 5)) == len(PROMPTS)
