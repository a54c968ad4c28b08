"""Tuners of our own on peft's base classes: singular vectors, bottleneck adapters and pooled low-rank updates.

peft finds a tuner by the type named in its configuration. :func:`own_config` enters ours in peft's tables, so that
wrapping, switching off, and the tensors of a checkpoint are peft's own code. Adapter tensors are float32 whatever the
base's type. Importing this module imports torch and peft; methods import it inside functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lily import LilyConfig, LilyModel
from peft.tuners.lily import Linear as LilyLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from peft_arena.methods.adapter import ADAPTER, TASK

ACTIVATIONS: Mapping[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class OwnConfig(PeftConfig):
    """The peft configuration of a tuner of ours."""

    target_modules: Sequence[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What the tuner's layers are made by."""
    modules_to_save: list[str] | None = None


class OwnLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with an adapter beside it."""

    prefix: ClassVar[str]
    """Begins the names of all attributes that hold adapter tensors."""

    def __init__(self, base_layer: nn.Module, config: OwnConfig) -> None:
        """Hold the base module; subclasses add their tensors, zeros where ``config.inference_mode`` is set."""
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return not self.disable_adapters and not self.merged

    def place(self) -> torch.device:
        """Return the device of the base module."""
        base = self.get_base_layer()
        return next(itertools.chain(base.parameters(), base.buffers())).device

    def change(self) -> Tensor:
        """Return the change of the base weight, shape (out, in), float32."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the base weight in place."""
        weight: Any = self.get_base_layer().weight
        weight.data += self.change()
        self.merged_adapters.append(ADAPTER)


class OwnTuner(BaseTuner):
    """Puts one kind of :class:`OwnLayer` in the place of the target modules."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - peft declares it for instances

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        make: Any = self.tuner_layer_cls
        self._replace_module(parent, target_name, make(target, peft_config), target)


def own_config(layer: type[OwnLayer], patterns: list[str], settings: dict[str, Any], new: bool = True) -> OwnConfig:
    """Return a configuration under which ``peft.get_peft_model`` puts layers of one kind in place.

    Args:
        layer: the kind of layer.
        patterns: names or last parts of names of the modules to adapt.
        settings: what the layers are made by, JSON values.
        new: whether the adapter is to start; if not, its tensors are zeros until a checkpoint is read.
    """
    tuner = type(f"{layer.__name__}Tuner", (OwnTuner,), {"prefix": layer.prefix, "tuner_layer_cls": layer})
    kind = entered(layer.prefix, tuner, OwnConfig)
    return OwnConfig(peft_type=kind, task_type=TASK, target_modules=patterns, settings=settings, inference_mode=not new)


def entered(prefix: str, tuner: type, config: type) -> Any:
    """Enter a tuner in peft's tables, if it is not there, and return the type that stands for it."""
    kind: Any = f"PEFT_ARENA_{prefix.rstrip('_').upper()}"
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, tuner)
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, prefix)
    return kind


class SvftLayer(OwnLayer):
    """W + U M V^T: U, V the singular vectors of W, M zero but for trained entries at fixed places."""

    prefix: ClassVar[str] = "svft_"
    adapter_layer_names: tuple[str, ...] = ("svft_values",)
    other_param_names: tuple[str, ...] = ("svft_u", "svft_v", "svft_index")

    def __init__(self, base_layer: nn.Module, config: OwnConfig) -> None:
        """Take the SVD of the base weight and choose the entries."""
        super().__init__(base_layer, config)
        weight: Any = base_layer.weight
        rows, columns = weight.shape
        inner, band = min(rows, columns), config.settings["off_diagonals"]
        entries = band_entries(inner, band)
        u, v = torch.zeros(rows, inner, device=weight.device), torch.zeros(inner, columns, device=weight.device)
        index = torch.zeros(2, entries, dtype=torch.long, device=weight.device)
        if not config.inference_mode:
            u, _, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            index = entry_index(config.settings["pattern"], band, u, v)
        self.svft_u = BufferDict({ADAPTER: u.contiguous()}, persistent=True)
        self.svft_v = BufferDict({ADAPTER: v.contiguous()}, persistent=True)
        self.svft_index = BufferDict({ADAPTER: index}, persistent=True)
        self.svft_values = nn.ParameterDict({ADAPTER: nn.Parameter(torch.zeros(entries, device=weight.device))})

    def inner(self) -> Tensor:
        """Return M, shape (k, k) with k the smaller side of the weight."""
        size = self.svft_v[ADAPTER].shape[0]
        values = self.svft_values[ADAPTER]
        return values.new_zeros(size, size).index_put(tuple(self.svft_index[ADAPTER]), values)

    def change(self) -> Tensor:
        """Return U M V^T, shape (out, in)."""
        found: Tensor = self.svft_u[ADAPTER] @ self.inner() @ self.svft_v[ADAPTER]
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output and that of the change."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.active:
            return result
        hidden = x.to(self.svft_v[ADAPTER].dtype) @ self.svft_v[ADAPTER].T
        return result + ((hidden @ self.inner().T) @ self.svft_u[ADAPTER].T).to(result.dtype)


def band_entries(size: int, off_diagonals: int) -> int:
    """Return the entries of a square matrix on its diagonal and ``off_diagonals`` more on either side."""
    return size * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)


def entry_index(pattern: str, off_diagonals: int, u: Tensor, v: Tensor) -> Tensor:
    """Return row and column of the trained entries of M, shape (2, entries), in row order.

    Args:
        pattern: ``plain``, ``banded``, ``random`` (from torch's random state) or ``top_k``.
        off_diagonals: the number of entries is that of a band with so many diagonals on either side.
        u: left singular vectors, shape (out, k).
        v: right singular vectors, shape (k, in); for ``top_k`` of the length of the left ones.
    """
    size = v.shape[0]
    place = torch.arange(size, device=v.device)
    if pattern in ("plain", "banded"):
        return ((place[:, None] - place[None, :]).abs() <= off_diagonals).nonzero().T.contiguous()
    entries = band_entries(size, off_diagonals)
    if pattern == "random":
        flat = torch.randperm(size * size)[:entries].to(v.device)
    else:
        flat = (u.T @ v.T).abs().flatten().topk(entries).indices
    flat = flat.sort().values
    return torch.stack([flat // size, flat % size])


class BottleneckLayer(OwnLayer):
    """A sublayer of a transformer block with s * up(activation(down(h))) added to what it gives.

    h is the sublayer's output (sequential) or its input (parallel). ``up`` starts at zero.
    """

    prefix: ClassVar[str] = "bottleneck_"
    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, config: OwnConfig) -> None:
        """Make the two linear maps, with biases."""
        super().__init__(base_layer, config)
        self.settings = config.settings
        width, size, device = self.settings["width"], self.settings["bottleneck"], self.place()
        self.bottleneck_down = nn.ModuleDict({ADAPTER: nn.Linear(width, size, device=device, dtype=torch.float32)})
        self.bottleneck_up = nn.ModuleDict({ADAPTER: nn.Linear(size, width, device=device, dtype=torch.float32)})
        nn.init.zeros_(self.bottleneck_down[ADAPTER].bias)  # type: ignore[arg-type]
        for parameter in self.bottleneck_up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the sublayer gives, its first tensor adapted; the rest (attention weights) untouched."""
        given = self.base_layer(*args, **kwargs)
        if not self.active:
            return given
        output, *rest = given if isinstance(given, tuple) else (given,)
        hidden = output
        if self.settings["parallel"]:
            hidden = args[0] if args else kwargs["hidden_states"]
        down, up = self.bottleneck_down[ADAPTER], self.bottleneck_up[ADAPTER]
        change = up(ACTIVATIONS[self.settings["activation"]](down(hidden.to(torch.float32))))
        output = output + (self.settings["scaling"] * change).to(output.dtype)
        return (output, *rest) if isinstance(given, tuple) else output


class QaLoraLayer(OwnLayer):
    """A quantised linear layer with s B A p(x) added, p the sums over groups of neighbouring inputs."""

    prefix: ClassVar[str] = "qalora_"
    adapter_layer_names: tuple[str, ...] = ("qalora_A", "qalora_B")

    def __init__(self, base_layer: nn.Module, config: OwnConfig) -> None:
        """Make A (rank, in / group_size), random, and B (out, rank), zero."""
        super().__init__(base_layer, config)
        base: Any = base_layer
        settings, device = config.settings, self.place()
        self.group_size, self.scaling = settings["group_size"], settings["scaling"]
        first = torch.empty(settings["rank"], base.in_features // self.group_size, device=device)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        second = torch.zeros(base.out_features, settings["rank"], device=device)
        self.qalora_A = nn.ParameterDict({ADAPTER: nn.Parameter(first)})
        self.qalora_B = nn.ParameterDict({ADAPTER: nn.Parameter(second)})
        self.dropout = nn.Dropout(settings["dropout"])

    def change(self) -> Tensor:
        """Return s B A with every column repeated over its group, shape (out, in)."""
        product = self.qalora_B[ADAPTER] @ self.qalora_A[ADAPTER]
        return self.scaling * product.repeat_interleave(self.group_size, dim=1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output and that of the change."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.active:
            return result
        sums = self.dropout(x.to(torch.float32)).unflatten(-1, (-1, self.group_size)).sum(-1)
        change = functional.linear(functional.linear(sums, self.qalora_A[ADAPTER]), self.qalora_B[ADAPTER])
        return result + (self.scaling * change).to(result.dtype)


class TokenLilyLinear(LilyLinear):
    """peft's Lily layer with a mixture of its own for every token, instead of one for the whole batch."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W0 x + s (sum_e p_e B_e) A x with p = softmax(router A x)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        hidden = self.lily_A[ADAPTER](x.to(torch.float32))  # (..., rank)
        shares = self.lily_router[ADAPTER](hidden).softmax(dim=-1)  # (..., experts)
        weighted = (shares[..., :, None] * hidden[..., None, :]).flatten(-2)  # (..., experts * rank)
        change = self.scaling[ADAPTER] * (weighted @ self.lily_B[ADAPTER].weight)
        return result + change.to(result.dtype)


class TokenLilyModel(LilyModel):
    """peft's Lily model with :class:`TokenLilyLinear` layers."""

    @staticmethod
    def _create_new_module(lily_config: Any, adapter_name: str, target: nn.Module) -> nn.Module:
        return TokenLilyLinear(target, adapter_name, r=lily_config.r, config=lily_config)


def token_lily(config: LilyConfig) -> LilyConfig:
    """Return the configuration with the type of :class:`TokenLilyModel`, which peft itself does not know."""
    config.peft_type = entered("lily_", TokenLilyModel, LilyConfig)
    return config
