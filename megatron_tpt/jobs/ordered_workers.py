"""Apply a function to a stream of items in several processes or threads: ordered results, few items in flight."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_tpt import logs
from megatron_tpt.errors import Fault
from megatron_tpt.processes import children_end_with_us, interrupts_blocked

_IN_FLIGHT_PER_WORKER = 3  # so that workers have their next items while the caller processes results

_work: Callable[[Any], Any]  # in a worker process


def map_in_order[S, T](
    make_work: Callable[[], Callable[[S], T]],
    items: Iterable[S],
    num_workers: int,
    describe: Callable[[S], str],
) -> Generator[tuple[S, T]]:
    """Yield every item and `work(item)` in the order of the items; each process creates its own `work`.

    `make_work` and items are pickled. Exceptions of `work` are raised here in place of the result. Raises Fault when a
    worker dies; `describe(item)` names the items in flight.
    """
    with children_end_with_us():  # the executor starts its processes in this thread, as items come
        context, arguments = multiprocessing.get_context("spawn"), (make_work, logs.for_worker())
        executor = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=arguments)
        in_flight: deque[S] = deque()

        def submit(item: S) -> Future[T]:
            in_flight.append(item)
            with interrupts_blocked():  # as long as there are fewer processes than `num_workers`, it starts one
                return executor.submit(_do, item)

        try:
            for result in _in_order(submit, items, _IN_FLIGHT_PER_WORKER * num_workers):
                yield in_flight.popleft(), result
        except BrokenProcessPool:
            places = dict.fromkeys(map(describe, (in_flight[0], in_flight[-1]))) if in_flight else {}
            raise Fault(
                f"a worker process died (out of memory?) at {' to '.join(places) or 'its start'}: run the same command "
                f"again, with fewer --num-workers where memory is short"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def map_in_threads[S, T](function: Callable[[S], T], items: Iterable[S], num_threads: int) -> Generator[T]:
    """Yield `function(item)` for every item in the order of the items, computed by `num_threads` threads."""
    with ThreadPoolExecutor(num_threads) as executor:
        yield from _in_order(lambda item: executor.submit(function, item), items, num_threads + 2)


def _in_order[S, T](submit: Callable[[S], Future[T]], items: Iterable[S], max_in_flight: int) -> Generator[T]:
    """The results of items. If `items` raises an error, earlier results are yielded before it is raised."""
    in_flight: deque[Future[T]] = deque()  # without the items, which may be large
    iterator, end, error = iter(items), object(), None
    while True:
        try:
            item: Any = next(iterator, end)
        except Exception as caught:
            error = caught
            break
        if item is end:
            break
        in_flight.append(submit(item))
        if len(in_flight) >= max_in_flight:
            yield in_flight.popleft().result()
    while in_flight:
        yield in_flight.popleft().result()
    if error is not None:
        raise error


def _start(make_work: Callable[[], Callable[[Any], Any]], set_up_logs: Callable[[], None]) -> None:
    global _work
    set_up_logs()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already run in parallel
    _work = make_work()


def _do(item: Any) -> Any:
    return _work(item)
