"""Freed memory that the C library keeps."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any


def give_back() -> None:
    """Return freed memory to the system where the C library is glibc; elsewhere do nothing.

    Matrices of many sizes, allocated and freed in turn, leave glibc's heap in pieces that it keeps: measuring OFT on a
    model of 135 million parameters, more than a gigabyte, six times what is in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
