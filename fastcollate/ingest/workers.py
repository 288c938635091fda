"""Who does the units of work: processes of this machine, or tasks of a Ray cluster; results in order."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from typing import Any

from fastcollate.errors import SourceReadError, import_extra
from fastcollate.ingest.encode import Encoded, encode_unit
from fastcollate.ingest.spec import JobSpec
from fastcollate.sources import Unit

Results = Generator[tuple[Unit, Encoded], None, None]
Runner = Callable[[Iterator[Unit], JobSpec, str, str], Results]
_FEW = 4  # units that one process has done sooner than workers are there: the first are small


def runner(engine: str, workers: int | None) -> Runner:
    """What does units with this engine."""
    return _ray_runner(workers) if engine == "ray" else _local_runner(workers)


def _local_runner(workers: int | None) -> Runner:
    """Worker processes; a few units alone, or with one worker, are done in this process."""

    def run(units: Iterator[Unit], spec: JobSpec, root: str, token: str) -> Results:
        head = list(islice(units, _FEW))
        units = chain(head, units)
        count = workers or _usable_cores()
        if count == 1 or len(head) < _FEW:
            yield from ((unit, encode_unit(unit, spec, root, token)) for unit in units)
            return
        tokenizer, template = spec.tools()
        tokenizer.warm(chats=template.end == "in_row")  # forked workers share what is loaded
        is_safe = sys.platform == "linux" and threading.active_count() == 1
        context = multiprocessing.get_context("fork" if is_safe else "spawn")
        with ProcessPoolExecutor(count, context, _begin_worker) as pool:
            try:
                submitted = ((unit, _submit(pool, unit, spec, root, token)) for unit in units)
                yield from _in_order(submitted, 2 * count, Future.result)
            except BrokenProcessPool as error:
                raise SourceReadError(
                    f"{root}: a worker process was killed, perhaps for want of memory; what is finished is kept: "
                    "run the same command again, with fewer workers if need be"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def _submit(pool: ProcessPoolExecutor, *task: Any) -> Future[Encoded]:
    """Hand a unit over. A worker that is started for it takes no part in Ctrl-C, which is for the leader; spawned, it
    does not run the user's script, of which it needs nothing, and which may call `prepare` again.
    """
    has_masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if has_masks else set()
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        return pool.submit(encode_unit, *task)
    finally:
        main.update(kept)
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    submitted: Iterator[tuple[Unit, Any]], at_once: int, result_of: Callable[[Any], Encoded]
) -> Iterator[tuple[Unit, Encoded]]:
    """Results in the order of the units, of which so many at most are at work or waiting for it."""
    running: deque[tuple[Unit, Any]] = deque()
    for pair in submitted:
        running.append(pair)
        if len(running) >= at_once:
            unit, reference = running.popleft()
            yield unit, result_of(reference)
    yield from ((unit, result_of(reference)) for unit, reference in running)


def _begin_worker() -> None:
    """End when the leader ends, however it does: another job may then begin, and this one's work is nobody's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each core has a worker already
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray_runner(workers: int | None) -> Runner:
    """The same function as tasks of a Ray cluster; Ray runs a lost task again. Only the driver holds the lock."""
    ray = import_extra("ray", "ray")

    def run(units: Iterator[Unit], spec: JobSpec, root: str, token: str) -> Results:
        if not ray.is_initialized():
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        task = ray.remote(num_cpus=1, max_retries=5)(encode_unit)
        count = workers or int(ray.cluster_resources().get("CPU", 1))
        submitted = ((unit, task.remote(unit, spec, os.path.abspath(root), token)) for unit in units)
        yield from _in_order(submitted, count + 1, partial(_ray_result, ray))

    return run


def _ray_result(ray: Any, reference: Any) -> Encoded:
    try:
        result: Encoded = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise SourceReadError(f"Ray gave a block up ({error}); what is finished is kept: run it again") from error
    return result
