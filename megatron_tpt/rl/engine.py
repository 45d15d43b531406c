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
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.engine: Engine = self._opened.enter_context(open_engine(self._options, needs=NEEDS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def sample[P, T](self, prepare: Callable[[Engine], P], sample: Callable[[Engine], T]) -> tuple[P, T]:
        """What `prepare` and `sample` return: the first sends the weights, the second samples. All ranks call it.

        When an engine fails while it samples, the engines of the ranks where that happened are opened again, and all
        ranks prepare and sample again: no unfinished rollout is taken for a result. Raises EngineError on all ranks
        when that does not help.
        """
        faults: list[str] = []
        for _ in range(_MAX_ATTEMPTS):
            if faults and faults[torch.distributed.get_rank()]:
                self._open_again()
            prepared, results, fault = prepare(self.engine), list[T](), ""
            try:
                results.append(sample(self.engine))
            except Exception as error:
                fault = one_line(error)
                logger.warning(f"the engine has failed: {fault}")
            faults = platform.gather_objects(fault)
            if not any(faults):
                return prepared, results[0]
        raise EngineError(
            f"the engine has failed {_MAX_ATTEMPTS} times in a row ({next(filter(None, faults))}): the same command "
            f"continues with the waves that are finished"
        )

    def _open_again(self) -> None:
        try:
            self._opened.close()
        except Exception as error:
            logger.warning(f"the engine that has failed was not closed: {one_line(error)}")
        self.__enter__()
