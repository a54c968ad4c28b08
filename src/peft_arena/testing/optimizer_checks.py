"""Checks of how a method learns: the optimizer that steps obeys the run, and gradients add up as they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_arena.methods.base import Attached, Capability
from peft_arena.methods.state import seed_torch
from peft_arena.testing.gradient_checks import check_slopes
from peft_arena.testing.subject import STEPS, Subject, difference, tokens
from peft_arena.testing.trial import Trial

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

RATE, DECAY = 1e-3, 0.5
DECAYED = 0.05
"""Largest part by which weight decay may be another than rate times decay times the parameter."""
LINEAR = 0.02
"""Largest part by which a step at half the rate may differ from half of a step."""
NOTHING = "the method does not train"


class Stepper:
    """Does single optimizer steps of one attachment, each from the same numbers with the same gradients."""

    def __init__(self, attached: Attached) -> None:
        """Begin a training and draw numbers and gradients."""
        import torch

        attached.begin(STEPS)
        self.attached = attached
        generator = torch.Generator().manual_seed(29)

        def near(tensor: Tensor, size: float) -> Tensor:
            return tensor + size * torch.randn(tensor.shape, generator=generator)

        trained = attached.trained()
        self.start = {name: near(p.detach(), 0.1) for name, p in trained.items()}
        self.gradients = {name: near(torch.zeros_like(p), 1.0) for name, p in trained.items()}

    def moves(
        self, decay: float = 0.0, change: Callable[[Optimizer], object] | None = None, gradient: float = 1.0
    ) -> dict[str, Tensor]:
        """Return by how much one step moves each parameter.

        Args:
            decay: weight decay of the run.
            change: done to the new optimizer before it steps, as a schedule does.
            gradient: factor of the gradients.
        """
        import torch

        trained = self.attached.trained()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.start[name])
        optimizer = self.attached.optimizer(RATE, decay)
        if change is not None:
            change(optimizer)
        for name, parameter in trained.items():
            parameter.grad = gradient * self.gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        left = [name for name, p in trained.items() if p.grad is not None and bool((p.grad != 0).any())]
        assert not left, f"zero_grad() of its optimizer leaves gradients, of {left[:3]}"
        return {name: p.detach() - self.start[name] for name, p in trained.items()}


def check_optimizer(trial: Trial) -> str | None:
    """Check that the optimizer goes by the run's rate, groups, schedule and weight decay, and the gradients given."""
    subject = trial.plain
    if not subject.has(Capability.TRAINS):
        return NOTHING
    stepper = Stepper(subject.attach())
    attached = stepper.attached
    _check_groups(attached, _reason_not_to_decay(trial))
    full = stepper.moves()
    names = {id(p): name for name, p in attached.trained().items()}

    def times(factor: float) -> Callable[[Optimizer], None]:
        def change(optimizer: Optimizer) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= factor

        return change

    largest = max(float(move.abs().max()) for move in full.values())
    assert largest > 0, "a step of its optimizer moves nothing"
    half = stepper.moves(change=times(0.5))
    for name, move in full.items():
        gap, size = difference(half[name], move / 2), float(move.abs().max())
        assert gap <= LINEAR * size + 1e-7, f"the optimizer ignores a schedule: at half the rate {name} moves otherwise"
    still = stepper.moves(gradient=0.0)
    moved = [name for name, move in still.items() if bool((move != 0).any())]
    assert not moved, f"its optimizer moves parameters whose gradients are zero (clipping is ignored): {moved[:3]}"
    _check_each_group(stepper, full, names)
    _check_decay(stepper, full, names)
    _check_rates_kept(stepper)
    return None


def _reason_not_to_decay(trial: Trial) -> bool:
    method = trial.plain.method
    return bool(method.card.undecayed) or bool(getattr(method, "trains_vectors", False))


def _rates(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    return {id(p): (float(g["lr"]), float(g["weight_decay"])) for g in groups for p in g["params"]}


def _check_groups(attached: Attached, undecayed: bool) -> None:
    promised = _rates(attached.parameter_groups(RATE, DECAY))
    twice = _rates(attached.parameter_groups(2 * RATE, DECAY))
    for name, parameter in attached.trained().items():
        rate, decay = promised[id(parameter)]
        assert abs(twice[id(parameter)][0] - 2 * rate) <= 1e-6 * rate and rate > 0, (
            f"the rate of {name} is {rate} at a learning rate of {RATE}, and {twice[id(parameter)][0]} at twice that"
        )
        matrix = parameter.ndim > 1 and min(parameter.shape) > 1
        assert decay in {0.0, DECAY}, f"the weight decay of {name} is {decay}, and the run's {DECAY}"
        assert decay == DECAY or not matrix or undecayed, (
            f"{name} is a matrix and gets no weight decay; if that is meant, the card says why (undecayed)"
        )
    used = _rates(attached.optimizer(RATE, DECAY).param_groups)
    wrong = [name for name, p in attached.trained().items() if used.get(id(p)) != promised[id(p)]]
    assert not wrong, (
        f"rate and weight decay of the optimizer are not those of parameter_groups(), of {', '.join(wrong[:3])}"
    )


def _check_each_group(stepper: Stepper, full: dict[str, Tensor], names: dict[int, str]) -> None:
    for number, group in enumerate(stepper.attached.parameter_groups(RATE, 0.0)):
        inside = {names[id(p)] for p in group["params"]}

        def stop(optimizer: Optimizer, inside: set[str] = inside) -> None:
            for held in optimizer.param_groups:
                if inside & {names[id(p)] for p in held["params"]}:
                    held["lr"] = 0.0

        moves = stepper.moves(change=stop)
        for name, move in moves.items():
            wanted = full[name] * (name not in inside)
            gap = difference(move, wanted)
            assert gap <= 1e-7, f"with rate 0 in group {number} alone, {name} moves by {gap} else than it should"


def _check_decay(stepper: Stepper, full: dict[str, Tensor], names: dict[int, str]) -> None:
    """Check that decay takes rate x decay of each number away, with gradients and without."""
    moves, alone = stepper.moves(decay=DECAY), stepper.moves(decay=DECAY, gradient=0.0)
    rates = _rates(stepper.attached.parameter_groups(RATE, DECAY))
    for key, (rate, decay) in rates.items():
        name = names[key]
        start, more = stepper.start[name], moves[name] - full[name]
        if not decay:
            gap = float(more.abs().max())
            assert gap <= 1e-7, f"weight decay moves {name}, whose group has none, by {gap}"
            continue
        for seen, what in ((more, ""), (alone[name], ", whose gradient is zero")):
            done = -float((seen * start).sum() / (start * start).sum()) / (rate * decay)
            assert abs(done - 1) <= DECAYED, (
                f"the optimizer ignores weight decay: it does {done:.3g} times what is asked for to {name}{what}"
            )
            gap, size = difference(seen, -rate * decay * start), rate * decay * float(start.abs().max())
            assert gap <= DECAYED * size + 1e-6 * float(start.abs().max()), (
                f"weight decay moves a number of {name} by {gap} else than rate x decay x number{what}"
            )


def _check_rates_kept(stepper: Stepper) -> None:
    """Check that what the method does between two steps leaves the rates to the schedule."""
    attached = stepper.attached
    optimizer = attached.optimizer(RATE, DECAY)
    for group in optimizer.param_groups:
        group["lr"] *= 0.25
    before = [group["lr"] for group in optimizer.param_groups]
    for name, parameter in attached.trained().items():
        parameter.grad = stepper.gradients[name].clone()
    optimizer.step()
    attached.after_step(1, STEPS)
    attached.model.zero_grad(set_to_none=True)
    after = [group["lr"] for group in optimizer.param_groups]
    assert after == before, "between steps the method changes rates that a schedule has set"


def check_gradients(trial: Trial) -> str | dict[str, str] | None:
    """Check that gradients are those of the loss and add up, and that what is added to it is not one for each row."""
    subject = trial.plain
    if not subject.has(Capability.TRAINS):
        return NOTHING
    _check_sums(subject)
    return check_slopes(subject)


def _check_sums(subject: Subject) -> None:
    attached = subject.attach()
    attached.begin(STEPS)
    attached.model.train()
    _pass(attached, 2)
    once = {name: p.grad.clone() for name, p in attached.trained().items() if p.grad is not None}
    _pass(attached, 2)
    largest = max((float(one.abs().max()) for one in once.values()), default=0.0)
    for name, parameter in attached.trained().items():
        if parameter.grad is None:
            continue
        gap = difference(parameter.grad, 2 * once[name]) / largest
        assert gap <= 1e-4, f"gradients of two passes do not add up: that of {name} is {gap} away, of the largest one"
    attached.model.zero_grad(set_to_none=True)
    (own, inside), (own_more, inside_more) = _pass(attached, 1), _pass(attached, 3)
    for what, few, many in (("extra_loss()", own, own_more), ("the loss of its forward pass", inside, inside_more)):
        gap = abs(few - many)
        assert gap <= 1e-4 * max(1.0, abs(few)), (
            f"what {what} adds is {few} for a row, and {many} for three equal rows: it depends on the batch size"
        )


def _pass(attached: Attached, rows: int) -> tuple[float, float]:
    """Run a pass forward and backward over equal rows.

    Returns:
        What the method adds to the loss, and what the model's own forward adds to the cross-entropy of its logits.
    """
    import torch
    from torch.nn import functional

    ids = tokens()[:1].expand(rows, -1)
    with torch.random.fork_rng():
        seed_torch(5)
        output = attached.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        extra = attached.extra_loss()
    (output.loss if extra is None else output.loss + extra).backward()
    logits = output.logits[:, -ids.shape[1] :].detach().float()
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return 0.0 if extra is None else float(extra.detach()), float(output.loss.detach() - plain)
