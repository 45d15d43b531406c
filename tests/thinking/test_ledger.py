"""The ids that a job has seen."""

import numpy

from megatron_tpt.thinking.ledger import IdSet


def test_an_id_set_holds_what_was_added_one_by_one_or_in_blocks() -> None:
    draw = numpy.random.default_rng(0)
    digests = draw.integers(0, 2**64, size=300_000, dtype=numpy.uint64)
    seen = IdSet()
    known: set[int] = set()
    begin = 0
    while begin < len(digests):
        end = begin + int(draw.integers(1, 40_000))
        some = digests[begin:end]
        if draw.random() < 0.5:
            seen.update(some)
        else:
            for digest in some:
                seen.add(int(digest))
        known.update(map(int, some))
        begin = end
        asked = draw.choice(digests, 200)
        assert [int(digest) in seen for digest in asked] == [int(digest) in known for digest in asked]
