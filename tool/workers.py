"""Worker processes. Needs no torch."""
import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal

from tqdm import tqdm

from tool.cli import BadInput


def available_cores():
    """Returns the number of processor cores that this process may use: those of its affinity mask, fewer if a cgroup
    limits it, and divided by the number of ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    cores = max(cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1)
    try:
        with open('/sys/fs/cgroup/cpu.max', encoding='ascii') as file:
            quota, period = file.read().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):       # no cgroup, or its quota is 'max'
        return cores


def parallel_map(work, items, num_workers, desc, images=1):
    """Yields work(item) for every item, in order, from up to `num_workers` processes, with a progress bar.

    work: a function that can be pickled, or functools.partial of one. For few items this process does the work itself,
    because starting another one takes as long as about 50 images. images: the number that an item stands for. Raises
    what `work` raises, and BadInput if a process was killed.
    """
    items = list(items)
    bar = functools.partial(tqdm, total=len(items), desc=desc, dynamic_ncols=True, disable=None)  # only on a terminal
    workers = min(num_workers, multiprocessing.cpu_count(), len(items) * images // 50)
    if workers < 2:
        yield from bar(map(work, items))
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), signal.signal,
                                                  (signal.SIGINT, signal.SIG_IGN))     # Ctrl-C is for this process
    try:
        yield from bar(pool.map(work, items, chunksize=max(8 // images, 1)))
    except concurrent.futures.BrokenExecutor as error:
        raise BadInput(f'{desc}: a process was killed, perhaps for lack of memory: try fewer --num_workers') from error
    finally:
        pool.shutdown(cancel_futures=True)


class BoundedPool:
    """Runs jobs in worker processes, or in this process with 0 workers. Only as many jobs are waiting as keep the
    workers busy. `results` has what the jobs returned. The error of a job is raised by a later call, or goes to
    `errors` (see tool/on_error.py) under the job's name. Raises BadInput if a process was killed.
    """

    def __init__(self, workers, errors=None):
        self.results, self._errors = [], errors
        self._waiting, self._most = collections.deque(), 2 * workers
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context('spawn')) if workers else None

    def __enter__(self):
        return self

    def submit(self, work, *args, name=''):
        if self._pool is None:
            self._take(name, functools.partial(work, *args))
            return
        self._waiting.append((name, self._pool.submit(work, *args)))
        while len(self._waiting) > self._most or (self._waiting and self._waiting[0][1].done()):
            name, future = self._waiting.popleft()
            self._take(name, future.result)

    def _take(self, name, get_result):
        with self._errors.caught(name) if self._errors else contextlib.nullcontext():
            self.results.append(get_result())

    def __exit__(self, kind, error, _):
        if self._pool is None:
            return
        try:
            while self._waiting and kind is None:
                name, future = self._waiting.popleft()
                self._take(name, future.result)
        except concurrent.futures.BrokenExecutor as broken:
            error = broken
        finally:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, concurrent.futures.BrokenExecutor):
            raise BadInput('a CRF process was killed, perhaps for lack of memory: try fewer --crf_workers') from error
