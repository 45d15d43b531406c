"""This rank's engine, which is opened again when it fails."""

import contextlib
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from megatron_tpt import platform
from megatron_tpt.errors import one_line
from megatron_tpt.generation import Engine, EngineError, EngineOptions, open_engine
from megatron_tpt.rl.rollouts import NEEDS

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3


class OwnEngine:
    """The engine of this rank; use it as a context manager, after process groups are there."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._has_servers = options.weight_transfer is not None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.engine: Engine = self._opened.enter_context(open_engine(self._options, needs=NEEDS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def sample[P, C, T](
        self,
        update: Callable[[Engine], object],
        probe: Callable[[Engine], P],
        check: Callable[[P], C],
        sample: Callable[[Engine], T],
    ) -> tuple[C, T]:
        """What `check` and `sample` return: weights are sent, the engine probed, what it says checked by the trainer,
        and rollouts sampled. All ranks call it.

        When an engine fails, the engines of the ranks where that happened are opened again, and all ranks begin anew:
        no unfinished rollout is taken for a result. Servers are restarted by who started them, and asked again. Raises
        EngineError on all ranks when that does not help.
        """
        self._faults: list[str] = []
        for _ in range(_MAX_ATTEMPTS):
            if self._faults and self._faults[torch.distributed.get_rank()] and not self._has_servers:
                self._open_again()
            if not self._try(update) or not (probed := self._try(probe)):
                continue
            checked = check(probed[0])
            if sampled := self._try(sample):
                return checked, sampled[0]
        raise EngineError(
            f"the engine has failed {_MAX_ATTEMPTS} times in a row ({next(filter(None, self._faults))}): the same "
            f"command continues with the waves that are finished"
        )

    def _try[T](self, action: Callable[[Engine], T]) -> list[T]:
        """The result of `action`; nothing where it fails on some rank."""
        results, fault = list[T](), ""
        try:
            results.append(action(self.engine))
        except Exception as error:
            fault = one_line(error)
            logger.warning(f"the engine has failed: {fault}")
        self._faults = platform.gather_objects(fault)
        return [] if any(self._faults) else results

    def _open_again(self) -> None:
        try:
            self._opened.close()
        except Exception as error:
            logger.warning(f"the engine that has failed was not closed: {one_line(error)}")
        self.__enter__()
