"""Which thoughts are rejected. Light to import: the help of the command line needs nothing else."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_tpt.config.fields import NonNegativeInt, Share, check_bounds
from megatron_tpt.errors import UserError

Script = Literal[
    "arabic",
    "armenian",
    "bengali",
    "cjk",
    "cyrillic",
    "devanagari",
    "ethiopic",
    "georgian",
    "greek",
    "gujarati",
    "gurmukhi",
    "hangul",
    "hebrew",
    "kannada",
    "khmer",
    "lao",
    "latin",
    "malayalam",
    "myanmar",
    "sinhala",
    "tamil",
    "telugu",
    "thai",
    "tibetan",
]
"""Scripts by the first word of their characters' Unicode names; "cjk" is Han and the Japanese kana together."""


@dataclass(frozen=True)
class FilterOptions:
    """Thoughts that are no use: empty, looping, in a wrong script or language, refusals, copies of the document.

    Words are separated by spaces; in scripts without spaces every character counts as one.
    """

    min_words: NonNegativeInt = 8
    """Reject as "too_short" below this many words and numbers; 0 only rejects thoughts without any. The shortest worked
    answer of GSM8K has 9, so that less is hardly a thought. (Gopher requires 50 words of a web page.)"""
    max_repeated_share: Share = 0.5
    """Reject as "loop" when a larger share of the characters lies in runs of 8 words that occurred before; 1 switches
    it off. Gopher's limit for web pages is 0.12; thoughts restate and code repeats itself: above 0.5 are 1 in 300
    Python files and none of the answers of GSM8K, whose highest share is 0.43."""
    loop_words: NonNegativeInt = 64
    """Reject as "loop" when nine tenths of the last N words lie in runs of 8 words that occurred twice before: how a
    thought ends that ran into a loop and was truncated; 0 switches it off."""
    max_foreign_share: Share = 0.2
    """Reject as "wrong_script" when a larger share of the letters is in scripts that are not allowed, as when a model
    switches to another language half-way; 1 switches it off. A quoted word or name stays far below."""
    scripts: list[Script] = field(default_factory=list)
    """The scripts that are allowed; when none is given Latin and those that hold 5 % of the document's letters."""
    languages: list[str] = field(default_factory=list)
    """Reject as "wrong_language" a thought that is in none of these languages (codes of ISO 639-1, as `en de`),
    where py3langid is certain: too few words prove nothing. Any language when none is given."""
    max_refusal_words: NonNegativeInt = 100
    """Reject as "refusal" up to this many words when it begins by declining to do the task; longer ones continued to
    think. 0 switches it off."""
    max_copied_share: Share = 0.8
    """Reject as "copy" when a larger share of the characters lies in runs of 8 words that occur in the document; 1
    switches it off. Thoughts quote, so the limit is high; the highest share among the answers of GSM8K is 0.6."""

    def __post_init__(self) -> None:
        check_bounds(self, "--filters.")
        if self.languages:
            self._check_languages()

    def _check_languages(self) -> None:
        from megatron_tpt.languages import known_languages

        known = known_languages()
        if unknown := [code for code in self.languages if code not in known]:
            raise UserError(f"--filters.languages {unknown[0]}: is none of {' '.join(known)}")
