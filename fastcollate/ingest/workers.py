"""Who does the units of work: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
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

from fastcollate.errors import InputError, SourceReadError, import_extra
from fastcollate.ingest.places import FolderPlace, Place
from fastcollate.ingest.spec import JobSpec

_SLOW_IMPORTS = ("gigatoken", "tiktoken", "tokenizers", "numba", "s3fs", "gcsfs", "adlfs")
_LOOK_S = 1.0  # seconds after which a Ray cluster is looked at again
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
Results = Generator[tuple[Any, Any], None, None]
Runner = Callable[[Iterator[Any], Place, JobSpec, Any], Results]


def runner(engine: str, workers: int | None) -> Runner:
    """What does tasks with this engine: each with what became of it."""
    return _ray_runner(workers) if engine == "ray" else _local_runner(workers)


def _local_runner(workers: int | None) -> Runner:
    """Worker processes; a few tasks alone, or with one worker, are done in this process."""

    def run(tasks: Iterator[Any], place: Place, spec: JobSpec, token: Any) -> Results:
        head = list(islice(tasks, place.few))
        tasks = chain(head, tasks)
        count = workers or _usable_cores()
        if count == 1 or len(head) < place.few:
            yield from _alone(tasks, place, spec, token)
            return
        tokenizer, template = spec.tools()
        tokenizer.warm(chats=template.end == "in_row")  # forked workers share what is loaded
        try:
            if isinstance(place, FolderPlace):
                with _pool(count) as pool:
                    submitted = ((task, _submit(pool, place.work, task, spec, place.target, token)) for task in tasks)
                    yield from _in_order(submitted, place.turns * count + 1, Future.result)
                return
            with contextlib.ExitStack() as stack:
                pools = [stack.enter_context(_pool(1)) for _ in range(count)]

                def call(number: int, task: Any) -> Callable[[], Any]:
                    return _submit(pools[number], place.ahead, task, spec, place.target, token).result

                yield from _one_behind(tasks, call, count, place.bare)
        except BrokenProcessPool as error:
            raise SourceReadError(
                f"{place.root}: a worker process was killed, perhaps for want of memory; what is finished is kept: "
                "run the same command again, with fewer workers if need be"
            ) from error

    return run


def _alone(tasks: Iterator[Any], place: Place, spec: JobSpec, token: Any) -> Results:
    """All in this process."""
    if isinstance(place, FolderPlace):
        yield from ((task, place.work(task, spec, place.target, token)) for task in tasks)
        return
    with contextlib.closing(place.stream()) as stream:

        def call(_: int, task: Any) -> Callable[[], Any]:
            return partial(stream, task, spec, place.target, token)

        yield from _one_behind(tasks, call, 1, place.bare)


@contextlib.contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    context: Any = multiprocessing.get_context(_start_method())
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, *(name for name in _SLOW_IMPORTS if name in sys.modules)])
    with ProcessPoolExecutor(count, context, _begin_worker, (dict(os.environ),)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _start_method() -> str:
    """Workers are forked from this process where that has no thread, else from one that has only imported."""
    if sys.platform != "linux":
        return "spawn"
    if threading.active_count() == 1:
        return "fork"
    socket = os.path.join(multiprocessing.util.get_temp_dir(), "listener-12345678")  # of such a process
    return "forkserver" if len(os.fsencode(socket)) < _LONGEST_SOCKET else "spawn"


def _submit(pool: ProcessPoolExecutor, *task: Any) -> Future[Any]:
    """Hand a task over. A worker that is started for it takes no part in Ctrl-C, which is for the leader; spawned, it
    does not run the user's script, of which it needs nothing, and which may call `prepare` again.
    """
    has_masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if has_masks else set()
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        return pool.submit(*task)
    except (EOFError, ConnectionError) as error:  # what workers are forked from was killed
        raise BrokenProcessPool from error
    finally:
        main.update(kept)
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    submitted: Iterator[tuple[Any, Any]], at_once: int, result_of: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any]]:
    """Results in the order of the tasks, of which so many at most are at work or waiting for it."""
    running: deque[tuple[Any, Any]] = deque()
    for pair in submitted:
        running.append(pair)
        if len(running) >= at_once:
            task, reference = running.popleft()
            yield task, result_of(reference)
    yield from ((task, result_of(reference)) for task, reference in running)


def _one_behind(
    tasks: Iterator[Any], call: Callable[[int, Any], Callable[[], Any]], count: int, bare: Callable[[Any], Any]
) -> Results:
    """Results in the order of the tasks, of workers that give with a call what became of the call before.

    `call` tells a worker, by its number, its next task, or `None` after the last, and gives what waits for the result;
    `bare` is what of a task is kept meanwhile.
    """
    given: deque[Any] = deque()
    calls: deque[Callable[[], Any]] = deque()

    def taken(most: int) -> Results:
        while len(calls) > most:
            result = calls.popleft()()
            if result is not None:  # a worker's first
                yield given.popleft(), result

    number = 0
    for task in tasks:
        given.append(bare(task))
        calls.append(call(number % count, task))
        number += 1
        yield from taken(2 * count - 1)
    for last in range(max(0, number - count), number):
        calls.append(call(last % count, None))
    yield from taken(0)


def _begin_worker(environment: dict[str, str]) -> None:
    """End when the leader ends, however it does: another job may then begin, and this one's work is nobody's.

    What it was forked from may have begun when the leader's environment was another one, without the credentials.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each core has a worker already
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray_runner(workers: int | None) -> Runner:
    """The same function as tasks of a Ray cluster; Ray runs a lost task again. Only the driver holds the lock.

    As many tasks as the cluster has processors, also those that join late, are at work, and one waits (or, where they
    are small, as many).
    """
    ray = import_extra("ray", "ray")

    def run(tasks: Iterator[Any], place: Place, spec: JobSpec, token: Any) -> Results:
        if not ray.is_initialized():
            _join_cluster(ray, workers)
        work = ray.remote(num_cpus=1, max_retries=5)(place.work)
        running: dict[Any, Any] = {}

        def taken(most: Callable[[], int]) -> Results:
            while len(running) > most():
                for reference in ray.wait([*running], timeout=_LOOK_S)[0]:
                    yield running.pop(reference), _ray_result(ray, reference)

        try:
            for task in tasks:
                running[work.remote(place.packed(task), spec, place.target, token)] = place.bare(task)
                yield from taken(lambda: place.turns * (workers or _num_cpus(ray)))
            yield from taken(lambda: 0)
        finally:
            for reference in running:  # of a job that has failed
                ray.cancel(reference)
            if running:
                ray.wait([*running], num_returns=len(running), timeout=60)

    return run


def _join_cluster(ray: Any, workers: int | None) -> None:
    """Begin to use the cluster that there is (`RAY_ADDRESS`, or of this machine), else one of this process's own."""
    options = {"include_dashboard": False, "log_to_driver": False}
    try:
        try:
            ray.init(num_cpus=workers, **options)
        except ValueError:  # one that there is has its processors
            ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"engine='ray': no Ray cluster can be joined ({str(error).splitlines()[0]}); run `ray start` on this "
            "machine, or unset RAY_ADDRESS for a cluster of this process alone"
        ) from None


def _num_cpus(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise SourceReadError(f"Ray gave a block up ({error}); what is finished is kept: run it again") from error
