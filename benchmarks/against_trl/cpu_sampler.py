"""CPU time of a process and its descendants, over time.

Owns the samples. Invariant: when a process ends, the CPU time up to its last sample stays counted.
"""

import threading
import time
from bisect import bisect_left

import psutil

SAMPLE_SECONDS = 0.25


class CpuSampler:
    """A thread that samples until the `with` block ends."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._used: dict[psutil.Process, float] = {}
        self._times: list[float] = []
        self._totals: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> "CpuSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def total(self) -> float:
        """CPU seconds up to the last sample."""
        return self._totals[-1] if self._totals else 0.0

    def between(self, started_at: float, ended_at: float) -> float:
        """CPU seconds between two Unix times, interpolated between samples."""
        return self._at(ended_at) - self._at(started_at)

    def _at(self, moment: float) -> float:
        after = bisect_left(self._times, moment)
        if after == 0 or after == len(self._times):
            raise ValueError(f"{moment} is outside of the sampled time {self._times[:1]} to {self._times[-1:]}")
        start, end = self._times[after - 1], self._times[after]
        low, high = self._totals[after - 1], self._totals[after]
        return low + (high - low) * (moment - start) / (end - start)

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        try:
            processes = {self._root, *self._root.children(recursive=True)}
        except psutil.NoSuchProcess:
            processes = set()
        for process in processes | self._used.keys():  # a process whose parent has died is no descendant any more
            try:
                times = process.cpu_times()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue  # its last sample stays counted
            self._used[process] = times.user + times.system
        self._times.append(time.time())
        self._totals.append(sum(self._used.values()))
