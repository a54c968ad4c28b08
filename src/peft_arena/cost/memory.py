"""Peak memory of a block of code."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from peft_arena.core.measure import Measure

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""Written to clear_refs, sets the peak resident size back to the current one (man 5 proc)."""
SAMPLE_EVERY_S = 0.01
_OPEN: list[PeakMemory] = []
"""Blocks being measured by marks that a block inside them resets; the innermost last."""


class PeakMemory:
    """Measure the peak memory of a ``with`` block.

    On CUDA the peak of the tensors allocated on the current device, everything that was there before included. On the
    CPU the peak resident memory of the process above what it was at entry: from the kernel's own high-water mark where
    it can be reset, otherwise from samples every ten milliseconds, which miss short peaks.
    """

    def __init__(self, name: str, cuda: bool | None = None) -> None:
        """Prepare to measure.

        Args:
            name: becomes part of the metric, for example ``training``.
            cuda: measure CUDA memory; None: if there is a CUDA device.
        """
        self.name = name
        self._wanted = cuda
        self._measures: tuple[Measure, ...] | None = None
        self._sampler: _Sampler | None = None
        self._seen = (0, 0)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured; only after the block.

        Raises:
            RuntimeError: the block has not ended.
        """
        if self._measures is None:
            raise RuntimeError("peak memory is known only after the block")
        return self._measures

    def __enter__(self) -> PeakMemory:
        """Start measuring."""
        self._cuda = _has_cuda() if self._wanted is None else self._wanted
        for outer in _OPEN:
            outer._note()
        _OPEN.append(self)
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return self
        self._resettable = _reset_peak()
        self._before = _resident()
        if not self._resettable:
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring; a sampling thread ends even if the block has failed."""
        self._note()
        _OPEN.remove(self)
        if self._cuda:
            self._measures = self._from_cuda()
            return
        if self._sampler is not None:
            peak = self._sampler.stop()
            how = f"largest resident size read every {SAMPLE_EVERY_S:g} s (short peaks missed), minus that at entry"
        else:
            peak = self._seen[0]
            how = "kernel's high-water mark of resident memory (VmHWM, reset at entry), minus resident size at entry"
        value = max(peak - self._before, 0)
        name = f"peak_memory_{self.name}"
        self._measures = (Measure(metric=name, value=value, unit="bytes", better="lower", how=f"CPU: {how}", n=1),)

    def _note(self) -> None:
        """Remember the marks as they are, before a block inside this one resets them."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            now = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        else:
            now = (_high_water() if self._resettable else 0, 0)
        self._seen = (max(self._seen[0], now[0]), max(self._seen[1], now[1]))

    def _from_cuda(self) -> tuple[Measure, ...]:
        allocated, reserved = self._seen
        found = {
            f"peak_memory_{self.name}": (allocated, "torch.cuda.max_memory_allocated, model included"),
            f"peak_reserved_memory_{self.name}": (reserved, "torch.cuda.max_memory_reserved, model included"),
        }
        return tuple(
            Measure(metric=metric, value=value, unit="bytes", better="lower", how=how, n=1)
            for metric, (value, how) in found.items()
        )


@contextmanager
def unmeasured() -> Iterator[None]:
    """Leave the block out of every measurement around it, as far as marks can be reset: it is none of the work."""
    for outer in _OPEN:
        outer._note()
    try:
        yield
    finally:
        if _OPEN:
            gc.collect()
            _forget_peak(_OPEN[-1]._cuda)


def _forget_peak(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()


class _Sampler(threading.Thread):
    """Reads the resident size again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="peak-memory")
        self._ended = threading.Event()
        self._peak = _resident()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return max(self._peak, _resident())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _reset_peak() -> bool:
    """Reset the kernel's high-water mark; say whether that worked."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
        return _high_water() > 0
    except (OSError, ValueError):
        return False


def _high_water() -> int:
    """Return the kernel's high-water mark of resident memory in bytes.

    Raises:
        ValueError: the kernel does not give it.
    """
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM")


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
