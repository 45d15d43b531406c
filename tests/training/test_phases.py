"""The phase of a training thread: the innermost, but whole for validations and checkpoints."""

import pytest

from megatron_tpt.training.phases import current_phase, phase


def test_the_innermost_phase_counts_and_ends_with_its_block() -> None:
    with phase("update"):
        with phase("forward and backward"), phase("waiting for data"):
            assert current_phase() == "waiting for data"
        assert current_phase() == "update"
    assert current_phase() == "between steps"


def test_what_happens_in_a_validation_or_for_a_checkpoint_belongs_to_it() -> None:
    for name in ("validation", "checkpoint"):
        with phase(name), phase("forward and backward"):
            assert current_phase() == name


def test_a_failure_ends_the_phase() -> None:
    @phase("validation")
    def fail() -> None:
        raise OSError

    with pytest.raises(OSError):
        fail()
    assert current_phase() == "between steps"
