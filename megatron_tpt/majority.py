"""Which of several things that should be equal are not."""

import collections
from collections.abc import Mapping


def outliers[K](values: Mapping[K, object]) -> list[K]:
    """The keys whose value most others do not have; all of them where there is no such majority."""
    counts = collections.Counter(values.values()).most_common(2)
    has_majority = len(counts) == 1 or counts[0][1] > counts[1][1]
    return [key for key, value in values.items() if not has_majority or value != counts[0][0]]
