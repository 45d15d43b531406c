"""Data sets of the Hugging Face Hub, streamed: `hf://owner/name/config?split=train&revision=main`.

`datasets` is imported where it is needed: it takes seconds.
"""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from megatron_tpt.errors import Fault, UserError, failure, one_line
from megatron_tpt.records.record import DamagedSource
from megatron_tpt.records.tables import Choose, Piece, loaded_piece

SCHEME = "hf://"
_ROWS_PER_BATCH = 256
_SYNTAX = "hf://OWNER/NAME[/CONFIG][?split=SPLIT][&revision=REVISION]"


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set, on the Hub or in a folder laid out as on the Hub."""

    path: str
    """"owner/name", or a folder."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit, tag or branch; name a commit where a job may be resumed after the data set has changed."""

    @classmethod
    def parse(cls, url: str) -> "HubDataset":
        """Read `hf://owner/name/config?split=train&revision=...`; a path that begins with / or . is a folder."""
        place, _, query = url.removeprefix(SCHEME).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := sorted(options.keys() - {"split", "revision"}):
            raise UserError(f"{url}: unknown option {unknown[0]!r}; write {_SYNTAX}")
        if place.startswith(("/", ".")):
            return cls(place, None, **options)
        parts = place.removeprefix("datasets/").strip("/").split("/")
        if not 1 <= len(parts) <= 3 or not all(parts):
            raise UserError(f"{url}: no name of a data set; write {_SYNTAX}")
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, **options)

    def num_shards(self) -> int:
        """How many files or parts the data set itself is made of."""
        return _stream(self).num_shards

    def num_rows(self) -> int | None:
        """How many rows the data set says it has; None where it does not."""
        split = (_stream(self).info.splits or {}).get(self.split)
        return (split.num_examples or None) if split is not None else None

    def pieces(self, source_name: str, index: int, choose: Choose) -> Iterator[Piece]:
        """The rows of shard `index`. Raises Fault when the Hub cannot be reached."""
        import datasets
        import pyarrow
        from huggingface_hub.utils import httpx  # its successor, by now: what the Hub's own library speaks with

        stream = _stream(self)
        shard = stream.shard(stream.num_shards, index).with_format("arrow")
        try:
            for table in shard.iter(_ROWS_PER_BATCH):
                table = table.select(choose(source_name, table.schema))
                yield loaded_piece(table)
        except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, ValueError, EOFError, zlib.error) as error:
            raise DamagedSource(f"not readable ({one_line(error)})") from error
        except (OSError, httpx.HTTPError) as error:
            raise Fault(f"{source_name}: cannot be read ({one_line(error)}); run again to continue") from error


@functools.lru_cache(maxsize=8)
def _stream(dataset: HubDataset) -> Any:
    import datasets
    from huggingface_hub.utils import httpx

    try:
        return datasets.load_dataset(
            dataset.path, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        advice = "check the name and the network, or download the data set and give its folder"
        raise failure(f"{SCHEME}{dataset.path}: cannot be opened ({one_line(error)}); {advice}", error) from error
