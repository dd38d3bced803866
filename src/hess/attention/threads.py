"""Threads for work on a CPU that is shared out while it runs."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(work: Callable[[], None]) -> None:
    """Run ``work`` in as many threads as torch uses, in each of which torch uses only one."""
    threads = torch.get_num_threads()
    if threads == 1:
        return work()
    pool = _thread_pool(threads, os.getpid())
    try:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    finally:
        # Threads that are started later begin with the number that was set last.
        torch.set_num_threads(threads)


@functools.cache
def _thread_pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept, because starting threads may take longer than what they do.

    One per process: a forked process has the pool of its parent, but none of the threads.
    """
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
