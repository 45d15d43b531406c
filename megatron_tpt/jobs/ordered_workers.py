"""One function over a stream of items in several processes: results in order, few items in flight."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_tpt.errors import Fault
from megatron_tpt.processes import children_end_with_us

_IN_FLIGHT_PER_WORKER = 3  # so that a worker has its next item while we are busy with results

_work: Callable[[Any], Any]  # in a worker process


def map_in_order[S, T](
    make_work: Callable[[], Callable[[S], T]],
    items: Iterable[S],
    num_workers: int,
    describe: Callable[[S], str],
) -> Generator[tuple[S, T]]:
    """Every item and `work(item)`, in the order of the items, where each of the processes makes its own `work`.

    `make_work` and items are pickled. What `work` raises is raised here,
    in the place of its item. Raises Fault when a worker dies; `describe(item)` names what it was at.
    """
    with children_end_with_us():  # the executor starts its processes in this thread, as items come
        executor = ProcessPoolExecutor(
            num_workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(make_work,)
        )
        in_flight: deque[tuple[S, Future[T]]] = deque()
        try:
            for item in items:
                in_flight.append((item, executor.submit(_do, item)))
                if len(in_flight) >= _IN_FLIGHT_PER_WORKER * num_workers:
                    yield in_flight[0][0], in_flight[0][1].result()
                    in_flight.popleft()
            while in_flight:
                yield in_flight[0][0], in_flight[0][1].result()
                in_flight.popleft()
        except BrokenProcessPool:
            places = dict.fromkeys(describe(item) for item, _ in (in_flight[0], in_flight[-1])) if in_flight else {}
            raise Fault(
                f"a worker process died (out of memory?) at {' to '.join(places) or 'its start'}: run the same command "
                f"again, with fewer --num-workers where memory is short"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def _start(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = make_work()


def _do(item: Any) -> Any:
    return _work(item)
