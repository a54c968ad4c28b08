"""Layers of ``peft`` whose arithmetic is mended; this module imports torch and peft, so import it inside functions.

The mended classes take the place of peft's on a wrapped model (``layer.__class__``). They add a change to the layer's
own output, where peft's compute with a changed weight: on a bfloat16 base that weight is rounded, and with it changes
smaller than the rounding disappear (GLoRA, Super-Tuning), or float32 takes the place of the base's own product, so that
the untrained model is not the pretrained one (HRA, MiSS).

A bfloat16 base is trained under autocast, which rounds every matrix product, and evaluated without. Where a change is
the small difference of large numbers, the difference is taken in float32, outside of autocast (:func:`exact`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.boft.layer import Linear as BoftLinear
from peft.tuners.deft.layer import DeftLinear
from peft.tuners.frod.layer import Linear as FrodLinear
from peft.tuners.glora.layer import GloraLinear
from peft.tuners.hra.layer import HRALinear
from peft.tuners.miss.layer import MissLinear
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.osf.layer import Linear as OsfLinear
from peft.tuners.psoft.layer import Linear as PsoftLinear
from peft.tuners.supertuning.layer import Linear as SupertuningLinear
from torch import Tensor
from torch.nn import functional

from peft_arena.methods.adapter import ADAPTER, tuner_layers

if TYPE_CHECKING:
    from peft import PeftModel


def exact(x: Tensor) -> torch.autocast:
    """Return a context in which products are not rounded by autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


class AddsChange:
    """A layer that adds ``change()`` times its input to the output of its base layer."""

    base_layer: Any
    disable_adapters: bool
    merged: bool

    def change(self) -> Tensor:
        """Return tuned minus pretrained weight, shape (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tuned layer's output in the type of the base layer's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        return result + functional.linear(x, self.change().to(x.dtype)).to(result.dtype)


class MissBatChange(AddsChange, MissLinear):
    """MiSS in its "bat" form beside its base layer."""

    def change(self) -> Tensor:
        """Return W0 blockwise times D, plus D."""
        change: Tensor = self.get_delta_weight(ADAPTER, self.base_layer.weight)
        return change


class GloraChange(AddsChange, GloraLinear):
    """GLoRA beside its base layer."""

    def change(self) -> Tensor:
        """Return W0 * A + B, entry by entry, in the type of the weight."""
        weight = self.base_layer.weight
        factor, addition = self.glora_A[ADAPTER](), self.glora_B[ADAPTER]()
        return weight * factor.to(weight.dtype) + addition.to(weight.dtype)


class SupertuningChange(AddsChange, SupertuningLinear):
    """Super-Tuning beside its base layer."""

    def change(self) -> Tensor:
        """Return the trained entries, zero elsewhere."""
        weight, values = self.base_layer.weight, self.supertuning_values[ADAPTER]
        indices = self.supertuning_indices[ADAPTER].long()
        zeros = torch.zeros(weight.numel(), device=weight.device, dtype=values.dtype)
        return zeros.scatter_add(0, indices, values).reshape(weight.shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tuned layer's output in the type of the base layer's, with the low-rank part if there is one."""
        result = super().forward(x, *args, **kwargs)
        rank = self.supertuning_rank[ADAPTER]
        if rank == 0 or self.disable_adapters or self.merged:
            return result
        first, second = self.supertuning_lora_A[ADAPTER], self.supertuning_lora_B[ADAPTER]
        dropped = self.supertuning_lora_dropout[ADAPTER](x).to(first.weight.dtype)
        scale = self.supertuning_lora_alpha[ADAPTER] / rank
        return result + (scale * second(first(dropped))).to(result.dtype)


MENDED: dict[type, type] = {
    MissLinear: MissBatChange,
    GloraLinear: GloraChange,
    SupertuningLinear: SupertuningChange,
}


def use_changes(model: PeftModel) -> None:
    """Let every adapted layer whose weight is not float32 add its change; the others stay as peft made them."""
    for layer in tuner_layers(model).values():
        if layer.get_base_layer().weight.dtype != torch.float32:
            layer.__class__ = MENDED[type(layer)]


class LowRank:
    """A layer that adds a product of two matrices, computed exactly as peft's LoRA layer computes it.

    So a checkpoint of the two matrices as a LoRA gives the same outputs, bit for bit.
    """

    base_layer: Any
    disable_adapters: bool
    merged: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return matrices A (rank, in) and B (out, rank), float32; the change of the weight is B A."""
        raise NotImplementedError

    def drop(self, x: Tensor) -> Tensor:
        """Return the input with dropout, if the method has one."""
        return x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tuned layer's output in the type of the base layer's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        with exact(x):
            a, b = self.factors()
        change = functional.linear(functional.linear(self.drop(x.to(a.dtype)), a), b)
        return (result + change).to(result.dtype)


class LowRankHra(LowRank, HRALinear):
    """HRA as a change of rank r; peft builds the (in, in) matrix of the reflections in each forward pass.

    With columns u_i of length one, H_1 ... H_r = I - U T U^T, where T^-1 is the part of U^T U above the diagonal and
    one half on it.
    """

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U^T, and -W0 U T."""
        u = functional.normalize(self.hra_u[ADAPTER], dim=0)
        inverse = torch.triu(u.T @ u, diagonal=1) + 0.5 * torch.eye(u.shape[1], device=u.device)
        images = Projected.apply(u, self.base_layer.weight.T).T
        return u.T, -torch.linalg.solve_triangular(inverse, images, upper=True, left=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tuned layer's output in the type of the base layer's; reflections cancel in float32 only."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        with exact(x):
            a, b = self.factors()
            change = functional.linear(functional.linear(x.float(), a), b)
        return (result + change).to(result.dtype)


class BlockBoft(BoftLinear):
    """BOFT of one factor, block by block; peft builds (in, in) matrices in each forward pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tuned layer's output in the type of the input."""
        if self.disable_adapters or self.merged:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        with exact(x):
            blocks = self.boft_dropout[ADAPTER](self.cayley_batch(self.boft_R[ADAPTER][0])[None])[0]
        turned = torch.einsum("...di,dij->...dj", x.unflatten(-1, blocks.shape[:2]), blocks.to(x.dtype)).flatten(-2)
        base: Any = self.base_layer
        result = functional.linear(turned.to(x.dtype), base.weight) * self.boft_s[ADAPTER].squeeze(-1)
        return (result if base.bias is None else result + base.bias).to(x.dtype)


class LowRankPsoft(LowRank, PsoftLinear):
    """PSOFT as the product of V^T and U S (R - I)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the frozen right vectors, and the left ones times the change of the rotation."""
        a, b = self._get_psoft_ab_cache_buffers(ADAPTER)
        middle: Any = self.psoft_R[ADAPTER]
        rotation = middle.get_matrix()
        eye = torch.eye(rotation.shape[0], device=rotation.device, dtype=rotation.dtype)
        return a, self.scaling[ADAPTER] * b @ (rotation - eye)

    def drop(self, x: Tensor) -> Tensor:
        """Return the input with dropout."""
        dropped: Tensor = self.psoft_dropout[ADAPTER](x)
        return dropped


class LowRankOsf(LowRank, OsfLinear):
    """OSF as the trained components minus the starting ones, U S V - U0 S0 V0 = (U S - U0 S0) V + U0 S0 (V - V0)."""

    osf_svd_params: Any

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [V; V - V0] and [U S - U0 S0, U0 S0]."""
        now = self.osf_svd_params[ADAPTER]
        left, values, right = self.start()
        a = torch.cat([now["V_low"], now["V_low"] - right], dim=0)
        b = torch.cat([now["U_low"] * now["S_low"] - left * values, left * values], dim=1)
        return a, b

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the starting components: left vectors, values, right vectors."""
        return self._osf_U_low_init[ADAPTER], self._osf_S_low_init[ADAPTER], self._osf_V_low_init[ADAPTER]

    def split(self) -> None:
        """Split the weight again in float32, where peft rounded the components to the type of the weight.

        Casting the trained ones to float32 has cost them the hooks that project their gradients; they get them again.
        """
        with torch.no_grad():
            left, values, right = torch.linalg.svd(self.base_layer.weight.float(), full_matrices=False)
            kept, now = self.effective_rank[ADAPTER], self.osf_svd_params[ADAPTER]
            parts = {"U": left[:, kept:], "S": values[kept:], "V": right[kept:]}
            for name, part in parts.items():
                now[f"{name}_low"].data = part.clone().contiguous()
                getattr(self, f"_osf_{name}_low_init")[ADAPTER] = part.clone().contiguous()
            for name, part in {"U": left[:, :kept], "V": right[:kept]}.items():
                high = getattr(self, f"_osf_{name}_high")
                if ADAPTER in high:
                    high[ADAPTER] = part.clone().contiguous()
        self._detach_hooks()
        self._attach_hooks(ADAPTER)


class Projected(torch.autograd.Function):
    """The product q^T W in float32, which keeps no float32 copy of W for the backward pass; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, weight: Tensor) -> Tensor:
        """Return q^T W, shape (rank, in), of q (out, rank) and W (out, in)."""
        ctx.save_for_backward(weight)
        return q.T @ weight.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of q."""
        (weight,) = ctx.saved_tensors
        return weight.float() @ grad.T, None


class LowRankDeft(LowRank, DeftLinear):
    """DEFT as the product of Q and s R - q^T W0."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return s R - q^T W0, and Q."""
        left, right = self._project(self.deft_P[ADAPTER], ADAPTER)
        removed: Tensor = Projected.apply(right, self.base_layer.weight)
        return self.deft_R[ADAPTER] * self.deft_scaling[ADAPTER] - removed, left

    def settle(self) -> None:
        """Choose R so that nothing is changed, as peft does before it rounds R to the type of the weight."""
        with torch.no_grad():
            _, right = self._project(self.deft_P[ADAPTER], ADAPTER)
            removed: Tensor = Projected.apply(right, self.base_layer.weight)
            self.deft_R[ADAPTER].copy_(removed / self.deft_scaling[ADAPTER])


class FirmRotation(OFTRotationModule):
    """COFT's rotation, whose projection leaves alone what has been projected.

    peft projects in every forward pass, and rounding moves the parameters each time, also in evaluation.
    """

    def _project_batch(self, q: Tensor, eps: float = 1e-5) -> Tensor:
        limit = eps / self.weight.shape[0] ** 0.5
        norm = 2**0.5 * q.norm(dim=1, keepdim=True)
        return torch.where(norm <= limit * (1 + 1e-5), q, q * (limit / norm))


class FrodChange(FrodLinear):
    """FRoD as a change beside its base layer: U (S + L - L0) V^T, nothing at the start.

    peft computes U (S + L) V^T in place of the weight, which it is only up to the rounding of the decomposition.
    """

    base_layer: Any
    frod_start: Tensor

    def settle(self) -> None:
        """Derive U and L0 from the shared V and the weight: W0 = U L0 V^T, the columns of U of length one."""
        with torch.no_grad():
            shared: Any = self.frod_V
            basis = shared[ADAPTER].double()
            weight = self.base_layer.weight.to(basis.device, torch.float64)
            try:
                columns = torch.linalg.solve(basis, weight.T).T
            except torch.linalg.LinAlgError:
                columns = weight @ torch.linalg.pinv(basis).T
            lengths = columns.norm(dim=0)
            present = lengths > 1e-6 * lengths.max()
            columns = torch.where(present, columns / lengths, 0.0)
            self.frod_U[ADAPTER] = columns.float()
            self.register_buffer("frod_start", torch.where(present, lengths, 0.0).float(), persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the tuned layer's output in the type of the base layer's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dropped = self.frod_dropout[ADAPTER](x.float())
        u, v, sparse, lengths = self._get_frod_tensors(ADAPTER, device=x.device, dtype=torch.float32)
        inner = (dropped @ v).reshape(-1, v.shape[1])
        inner = self._sparse_activation_mm(inner, sparse) + inner * (lengths - self.frod_start)
        change = functional.linear(inner, u).reshape(result.shape)
        return (result + change).to(result.dtype)

    def _get_frod_tensors(
        self, adapter: str, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bases: Any = self.frod_V
        places: Any = self.frod_s_indices
        v, values = bases[adapter].to(device, dtype), self.frod_lambda_s_values[adapter].to(device, dtype)
        entries = torch.sparse_coo_tensor(places[adapter].to(device), values, v.shape, check_invariants=False)
        lengths = self.frod_lambda_l[adapter].to(device, dtype)
        return self.frod_U[adapter].to(device, dtype), v, entries.coalesce(), lengths

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return tuned minus pretrained weight, shape (out, in)."""
        weight = self.base_layer.weight
        u, v, sparse, lengths = self._get_frod_tensors(adapter, device=weight.device, dtype=torch.float32)
        inner = sparse.to_dense() + torch.diag(lengths - self.frod_start)
        return (u @ inner @ v.T).to(weight.dtype)
