"""Operations of products that torch's counter (2.13) does not know, and which products run without a known count.

The counter takes a kernel without a formula as free: experts that run as one grouped product, attention on CPUs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

PRODUCT = re.compile(
    r"(^|_)(\w*mm|gemm\w*|gemv\w*|matmul|mv|addmv|v?dot|conv(?!ert)\w*|linear|trilinear|attention|rnn)(_|$)"
)
"""Names of operators whose cost is that of a product of matrices."""


class UncountedError(RuntimeError):
    """A product ran whose operations are not known."""


def products() -> dict[Any, Callable[..., int]]:
    """Return a formula for each operator of this version of torch and transformers that the counter lacks."""
    import torch

    formulas: dict[str, Callable[..., int]] = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "aten::_grouped_mm": _grouped,
        "aten::_scaled_grouped_mm": _grouped,
        "transformers::grouped_mm_fallback": _grouped,
        "transformers::grouped_mm_fallback_backward": _grouped_backward,
        "aten::_int_mm": _grouped,
        "aten::mv": _vector,
        "aten::addmv": _added_vector,
        "aten::dot": _dot,
        "aten::vdot": _dot,
        "aten::addbmm": _added,
        "aten::_addmm_activation": _added,
    }
    found: dict[Any, Callable[..., int]] = {}
    for name, formula in formulas.items():
        space, operator = name.split("::")
        packet = getattr(getattr(torch.ops, space), operator, None)
        if packet is not None:
            found[packet] = formula
    return found


@contextmanager
def watched() -> Iterator[set[Any]]:
    """Collect the operators inside the block that are products by their names."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: set[Any] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            packet = getattr(func, "overloadpacket", None)
            if packet is not None and _is_product(str(packet)):
                found.add(packet)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


@cache
def _is_product(name: str) -> bool:
    return PRODUCT.search(name.rsplit(".", 1)[-1]) is not None


def _grouped(a: Any, b: Any, *_: object, out_shape: object = None, **__: object) -> int:
    """Count a product of matrices, of two batches of them, or of rows that are split into groups.

    Every row belongs to one group: (rows, k) times (groups, k, n) is 2 rows k n. Columns in groups, and groups of the
    inner dimension, are alike.
    """
    batches = a[0] if len(a) == 3 and len(b) == 3 else 1
    return int(2 * batches * a[-2] * a[-1] * b[-1])


def _grouped_backward(a: Any, b: Any, *_: object, out_shape: object = None, **__: object) -> int:
    return 2 * _grouped(a, b)


def _added(_: object, a: Any, b: Any, *__: object, out_shape: object = None, **___: object) -> int:
    return _grouped(a, b)


def _vector(a: Any, _: object, *__: object, out_shape: object = None, **___: object) -> int:
    return int(2 * prod(a))


def _added_vector(_: object, a: Any, *__: object, out_shape: object = None, **___: object) -> int:
    return int(2 * prod(a))


def _dot(a: Any, *_: object, out_shape: object = None, **__: object) -> int:
    return int(2 * prod(a))


def _attention(*shapes: Any, out_shape: object = None, **_: object) -> int:
    """Count attention on CPUs: every pair of positions, causal or not, as the counter does for kernels of GPUs."""
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(*shapes[:3]))


def _attention_backward(_: object, *shapes: Any, out_shape: object = None, **__: object) -> int:
    """Count its backward pass, which computes the scores again: five matrix products instead of two."""
    return _attention(*shapes[:3]) * 5 // 2
