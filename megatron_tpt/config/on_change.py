"""What another value of a field does on resume, and in a run that starts from `training.init_from`.

Every section has an entry for each of its fields. `training/resume.py` acts on it, docs/recipe.md shows it.

    @on_change({(Effect.WARNED, Effect.FREE): "learning_rate", (Effect.FREE, Effect.FREE): "name"})
    @dataclass
    class Section: ...
"""

from collections.abc import Callable, Mapping
from enum import Enum


class Effect(Enum):
    """What happens to a value that is not the checkpoint's: a name, and what it means."""

    FREE = "takes effect", "the new value holds from the first step on; nothing is said"
    WARNED = "warns", "the new value takes effect, with a warning that names it and the checkpoint's"
    NONE = "warns: no effect", "the weights are the checkpoint's: a value that is given causes a warning"
    REFUSED = "refused", "the error says the checkpoint's value; model fields are compared by the shapes they make"
    ALLOWED = (
        "allow_change",
        "refused; with `data.allow_change` the run continues at the samples consumed, with a warning",
    )
    CONTENT = (
        "by content",
        "compared by the samples it makes: refused where those read so far would be others, a warning with "
        "`data.allow_change`",
    )
    TOKENIZER = "by content of the tokenizer", "refused where it is another one (`training.allow_other_tokenizer`)"
    LAYOUT = (
        "takes effect, or refused",
        "refused for checkpoints with `checkpoint.optimizer_sharding: dp_reshardable`, takes effect for the others",
    )
    PRECISION = "warns, or refused", "warns; refused without `parallel.distributed_optimizer`"

    @property
    def label(self) -> str:
        """Its name in the documentation."""
        return self.value[0]

    @property
    def meaning(self) -> str:
        """What it means, in words."""
        return self.value[1]


TABLE: dict[type, Mapping[tuple[Effect, Effect], str]] = {}
"""By section: (on resume, from training.init_from) -> names of fields."""


def on_change[T: type](entries: Mapping[tuple[Effect, Effect], str]) -> Callable[[T], T]:
    """Enter the fields of a section: (on resume, from training.init_from) -> their names, separated by spaces.

    A run that starts from a checkpoint takes its weights and nothing else: there only fields of the model can
    contradict them.
    """

    def enter(section: T) -> T:
        TABLE[section] = entries
        return section

    return enter


def effects_of(cls: type, name: str) -> tuple[Effect, Effect]:
    """What another value of the field `name` of a section does: on resume, and from training.init_from. Raises KeyError
    for a field without an entry."""
    for base in cls.__mro__:
        for effects, names in TABLE.get(base, {}).items():
            if name in names.split():
                return effects
    raise KeyError(f"{cls.__name__}.{name} has no entry on what another value does (on_change)")
