"""What another value of a field can do: the terms of the table in config/changes.py."""

from enum import Enum


class Effect(Enum):
    """What becomes of a value that is not the checkpoint's: a name, and what it means."""

    FREE = "takes effect", "the new value holds from the first step on; nothing is said"
    WARNED = "warns", "the new value takes effect, with a warning that names it and the checkpoint's"
    NONE = "warns: no effect", "the weights are the checkpoint's: a value that is given is warned of"
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


Entries = dict[tuple[Effect, Effect], str]
"""(on resume, from training.init_from) -> names of fields."""
