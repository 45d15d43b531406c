"""The names of the shards of one index, `PREFIX-00003-of-00064`, and whether all of them are there."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.names import counted

_SHARD = re.compile(r"(?P<name>.*)-\d{5}-of-(?P<num_shards>\d{5})", re.DOTALL)


def shard_prefix(prefix: Path, shard: int, num_shards: int) -> Path:
    """Where a shard of a set goes."""
    return prefix.with_name(f"{prefix.name}-{shard:05d}-of-{num_shards:05d}")


def require_whole_sets(found: Sequence[Path], pattern: str, suffix: str) -> None:
    """Look at the prefixes that were found behind `pattern` by their files PREFIX`suffix`.

    Raises UserError where they belong to a set of which a shard has no such file: nobody asked for it by its name, so
    nobody else would notice.
    """
    sets = {
        (prefix.with_name(match["name"]), int(match["num_shards"]))
        for prefix in found
        if (match := _SHARD.fullmatch(prefix.name))
    }
    seen = set(found)  # every rank of a training run comes here: nothing is looked up a second time
    for prefix, num_shards in sorted(sets):
        shards = (shard_prefix(prefix, shard, num_shards) for shard in range(num_shards))
        missing = [shard for shard in shards if shard not in seen and not Path(f"{shard}{suffix}").exists()]
        if missing:
            raise UserError(
                f"{pattern}: {len(missing):,} of {counted(num_shards, 'shard')} missing: {missing[0]}{suffix} is the "
                "first; let the job that makes them finish, or name one by one those that you want"
            )
