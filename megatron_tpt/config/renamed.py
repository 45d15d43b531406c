"""Old names of options, fields and values that have been renamed. Each is read for one release, with a warning.

An entry is removed in the release after the one that it came with; files that the package itself wrote (checkpoints)
are read under the old names for as long as their entry is here.
"""

import functools
from collections.abc import Mapping
from typing import Any

FIELDS: dict[str, dict[str, str]] = {
    "AugmentOptions": {"records_per_shard": "rows_per_shard"},
    "IndexOptions": {"workers": "num_workers"},
    "PackOptions": {"on_bad_example": "on_bad_record"},
    "SftDataConfig": {"prompt_field": "prompt_column", "response_field": "response_column"},
}
"""By dataclass: the old name, and the new one."""
VALUES: dict[str, dict[str, dict[Any, Any]]] = {
    "TrainingConfig": {"dtype": {"fp32": "float32", "bf16": "bfloat16"}},
}
"""By dataclass and field, the same of values."""


def _entries[T](table: Mapping[str, Mapping[str, T]], cls: type) -> dict[str, T]:
    """The entries of a dataclass and of those that it extends."""
    return {old: new for base in cls.__mro__ for old, new in table.get(base.__name__, {}).items()}


@functools.cache
def names_of_before(cls: type) -> dict[str, str]:
    """The fields of a dataclass that have been renamed: the old name, and the new one."""
    return _entries(FIELDS, cls)


def value_of_now(cls: type, name: str, value: Any) -> Any:
    """A value of a field, under the name that it has now."""
    return _values_of_before(cls).get(name, {}).get(value, value) if isinstance(value, str) else value


@functools.cache
def _values_of_before(cls: type) -> dict[str, dict[Any, Any]]:
    return _entries(VALUES, cls)


def section_of_now(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a recipe that this package wrote, under the new names."""
    names = names_of_before(cls)
    now = {names.get(name, name): value for name, value in section.items()}
    return {name: value_of_now(cls, name, value) for name, value in now.items()}
