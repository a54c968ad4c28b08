"""The singular value decomposition of pretrained weights, made once and kept on disk by the weight's content.

A kept decomposition holds U, s and V^T in the type it was asked for: in float32 about as much again as the weights in
float32 for matrices far from square, twice as much for square ones. That is 0.6 GB for a model of 135 million
parameters and 33 GB for one of 7 billion. Importing this module imports torch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_arena.assets.wheel_files import cache_root
from peft_arena.core.ids import content_id
from peft_arena.core.parts import unfinished
from peft_arena.weights.change import Svd
from peft_arena.weights.gram import suits, svd_by_gram

ALGORITHM = 1
"""Version of the decomposition and of its file; a change of either raises it, and nothing older is read."""
_NAMES = Svd._fields
logger = logging.getLogger(__name__)


def svd(weight: Tensor, dtype: torch.dtype) -> Svd:
    """Return the thin singular value decomposition of a weight.

    In float32 by the Gram matrix in float64, if the singular vectors come out orthonormal, which is checked; that is
    faster than LAPACK in float32 and more exact. Otherwise, and in float64, by LAPACK in float64. Each pair of
    singular vectors is known up to a common sign only, and those of equal singular values up to a rotation: no
    quantity may depend on the choice. Directions of zero singular values are arbitrary orthonormal ones.

    Args:
        weight: shape (out, in), finite.
        dtype: float32 or float64, of the result.
    """
    matrix = weight.to(dtype)
    tall = matrix.shape[0] >= matrix.shape[1]
    upright = matrix if tall else matrix.T
    thin = svd_by_gram(upright) if suits(matrix) else None
    if thin is not None:
        long, values, short = thin
        left, right = (long, short.T) if tall else (short, long.T)
        return Svd(left.contiguous(), values, right.contiguous())
    exact = torch.float64 if matrix.device.type == "cpu" else matrix.dtype
    long, values, short = torch.linalg.svd(upright.to(exact).contiguous(), full_matrices=False)
    left, right = (long, short) if tall else (short.T, long.T)
    return Svd(left.to(dtype).contiguous(), values.to(dtype), right.to(dtype).contiguous())


def default_root() -> Path:
    """Return the directory where decompositions are kept unless the caller chooses another."""
    return cache_root() / "svd"


class SvdCache:
    """Decompositions on disk by the content of the weight, one safetensors file each, read by memory map.

    A damaged file is made anew. A disk that cannot be written to costs only the speed: it is said once.
    """

    def __init__(self, root: Path | None) -> None:
        """Keep decompositions in a directory, which need not exist yet; None: nowhere, each is made when asked for."""
        self.root = root
        self._refused = False

    def get(self, weight: Tensor, content: str, dtype: torch.dtype) -> Svd:
        """Return the decomposition of a weight: read if it is kept, otherwise made and kept.

        Args:
            weight: shape (out, in), finite.
            content: what identifies the values of the weight: a hash of them.
            dtype: float32 or float64.

        Returns:
            Tensors that may be views of a file and must not be written to.
        """
        if self.root is None:
            return svd(weight, dtype)
        path = self.path(content, dtype)
        found = _read(path, weight, dtype)
        if found is None:
            found = svd(weight, dtype)
            self._keep(path, found)
        return found

    def path(self, content: str, dtype: torch.dtype) -> Path:
        """Return where the decomposition of a weight is kept.

        Raises:
            ValueError: there is no directory.
        """
        if self.root is None:
            raise ValueError("this cache keeps nothing on disk")
        return self.root / f"{content_id([ALGORITHM, content, str(dtype)], 40)}.safetensors"

    def _keep(self, path: Path, made: Svd) -> None:
        if self._refused:
            return
        try:
            _write(path, made)
        except (OSError, SafetensorError) as error:
            self._refused = True
            logger.warning("cannot keep decompositions in %s: %s; going on without", self.root, error)


def _read(path: Path, weight: Tensor, dtype: torch.dtype) -> Svd | None:
    """Return what a file holds, None if there is none or it is not what was written."""
    rows, columns = weight.shape
    size = min(rows, columns)
    shapes = [(rows, size), (size,), (size, columns)]
    try:
        with safe_open(path, framework="pt") as stored:
            sums = stored.metadata() or {}
            if set(stored.keys()) != set(_NAMES):
                return None
            found = Svd(*(stored.get_tensor(name) for name in _NAMES))
    except (OSError, SafetensorError):
        return None
    right = all(tensor.shape == shape and tensor.dtype == dtype for tensor, shape in zip(found, shapes, strict=True))
    if not right or _sums(found) != sums:
        return None
    return found._replace(values=found.values.clone())  # who keeps the values must not keep the whole map


def _write(path: Path, made: Svd) -> None:
    """Write a file that a reader sees whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as part:
        save_file(made._asdict(), part, metadata=_sums(made))
        part.replace(path)


def _sums(made: Svd) -> dict[str, str]:
    """Return the sum of each tensor's bytes taken as whole numbers: any one flipped bit changes it.

    It is taken at the speed of memory, where a cryptographic hash would take longer than what the cache is for.
    """
    return {name: str(_sum(tensor)) for name, tensor in made._asdict().items()}


def _sum(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().view(-1)
    words = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    whole = int(flat[:words].view(torch.int64).sum()) if words else 0
    return whole + int(flat[words:].view(torch.uint8).sum())
