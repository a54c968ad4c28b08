"""One page of documentation per method, made from its card and settings: ``python -m peft_arena.methods.pages DIR``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from peft_arena.core.errors import UserError
from peft_arena.methods.base import Capability, Method, PathKind
from peft_arena.methods.registry import METHODS
from peft_arena.store.conformance import UNTRIED, conformance_of

INDEX = "README.md"
CAN = {
    Capability.TRAINS: "has trained parameters",
    Capability.LINEAR_DELTA: "is a change of linear weights that does not depend on the input",
    Capability.MERGEABLE: "can be merged into plain weights",
    Capability.IDENTITY_AT_INIT: "changes no output before training",
    Capability.NEEDS_CALIBRATION: "needs examples of the training data to attach",
    Capability.CHANGES_BASE: "writes to the pretrained weights in memory",
    Capability.ONLINE_RL: "takes objectives that sample from the policy (GRPO)",
    Capability.QUANTIZED_BASE: "takes a quantised base model",
    Capability.NEEDS_QUANTIZED_BASE: "takes nothing but a quantised base model",
    Capability.VIRTUAL_TOKENS: "puts trained vectors into the input, so the context has less room",
    Capability.KEYS_AND_VALUES: "puts trained keys and values into the cache, so activations cannot be recomputed",
    Capability.PEFT_ADAPTER: "writes checkpoints that `PeftModel.from_pretrained` loads",
    Capability.LORA_ADAPTER: "writes checkpoints that are plain LoRAs, which every LoRA server loads",
}
"""What each capability means, for readers."""
PATHS = {
    PathKind.LINEAR: "linear: straight from the pretrained weights, W0 + f D",
    PathKind.CAYLEY: "cayley: a rotation whose skew-symmetric generator is scaled, orthogonal at every factor",
    PathKind.MULTIPLICATIVE: "multiplicative: by its own factors, lengths or angles of rows or columns",
    PathKind.NONE: "none: the tuned model cannot be said in weights",
}
"""What the kind of a path means, for readers."""
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "multiple_of": "multiple of {}"}
COLUMNS = {
    "merges": Capability.MERGEABLE,
    "same start": Capability.IDENTITY_AT_INIT,
    "calibration": Capability.NEEDS_CALIBRATION,
    "quantised": Capability.QUANTIZED_BASE,
    "GRPO": Capability.ONLINE_RL,
    "LoRA server": Capability.LORA_ADAPTER,
}


def pages() -> dict[str, str]:
    """Return the pages of all our methods and their index, by file name."""
    found = {f"{name}.md": method_page(name, METHODS.get(name)) for name in METHODS.own()}
    return {INDEX: index_page(), **found}


def write_pages(directory: Path) -> None:
    """Write all pages, and remove those of methods that are gone.

    Raises:
        UserError: the directory cannot be written, or has Markdown files that are no such pages.
    """
    found = pages()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.md"):
            if path.name not in found:
                if NOTE not in path.read_text(encoding="utf-8"):
                    raise UserError(f"{path} is no page of a method; give a directory of their own")
                path.unlink()
        for name, text in found.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write pages into {directory}: {error}") from error


NOTE = "<!-- Made by `make docs` from the method's card and settings; change those. -->"


def index_page() -> str:
    """Return the table of all methods, and of those that are not offered."""
    lines = [NOTE, "", "# Methods", ""]
    lines += [f"{len(METHODS.own())} methods. `Σ` sums over the adapted layers (targets); rates are where a search may"]
    lines += ["start on models of billions of parameters. How to add one: [extending](../extending.md).", ""]
    rows = []
    for name in METHODS.own():
        card = METHODS.get(name).card
        marks = ["yes" if capability in card.capabilities else "–" for capability in COLUMNS.values()]
        formula = card.parameters.replace("sum over targets of ", "Σ ")
        rows.append(
            [f"[{name}]({name}.md)", card.title, card.family, f"`{formula}`", *marks, _number(card.learning_rate)]
        )
    lines += _table(["name", "title", "family", "trained parameters", *COLUMNS, "rate"], rows)
    if METHODS.refused:
        lines += ["", "## Not offered", ""]
        lines += _table(["name", "why"], [[name, reason] for name, reason in sorted(METHODS.refused.items())])
    return "\n".join(lines) + "\n"


def method_page(name: str, kind: type[Method]) -> str:
    """Return the page of one method."""
    card = kind.card
    paper = f"[{card.paper}]({card.url})" if card.url else card.paper
    lines = [NOTE, "", f"# {card.title} (`{name}`)", "", card.description, ""]
    facts = [["family", card.family], ["paper", paper], ["trained parameters", f"`{card.parameters}`"]]
    facts += [["equation of a tuned weight", f"`{card.equation}`"]] if card.equation else []
    facts += [["no weight decay on matrices", card.undecayed]] if card.undecayed else []
    facts += [["gradients are not those of the loss", card.other_gradients]] if card.other_gradients else []
    facts += [["size set by", f"`{kind.size}`" if kind.size else "nothing: a parameter budget cannot choose it"]]
    facts += [["learning rate to start from, models of billions of parameters", _number(card.learning_rate)]]
    facts += [["learning rate on the micro model", _number(card.micro_learning_rate)]]
    facts += [["path from the pretrained (f = 0) to the tuned model (f = 1)", PATHS[card.path]]]
    drawn = ["the start"] if card.random_init else []
    drawn += ["the calibration examples"] if Capability.NEEDS_CALIBRATION in card.capabilities else []
    facts += [["the seed changes", ", ".join([*drawn, "data order and dropout"])]]
    lines += _table(["", ""], facts)
    lines += ["", "## How it works", "", *_explained(kind)]
    lines += ["", "## What it can do", ""]
    lines += _table(["", ""], [[text, "yes" if key in card.capabilities else "–"] for key, text in CAN.items()])
    lines += ["", "## Settings", ""]
    rows = [_setting(key, field) for key, field in kind.Config.model_fields.items()]
    lines += _table(["setting", "default", "allowed", "meaning"], rows) if rows else ["None."]
    lines += ["", "## Where this differs from the paper", ""]
    lines += [f"- {text}" for text in card.deviations] or ["Nowhere that we know of."]
    if card.known_failures:
        lines += ["", "## Known failures", "", "Checks of the conformance suite that it does not pass:", ""]
        lines += [f"- `{check}`: {reason}" for check, reason in card.known_failures.items()]
    lines += ["", "## What was tried", "", *_tried(name)]
    if Capability.TRAINS in card.capabilities:
        lines += ["", "## In a study", "", "```yaml", *_arm(name, kind), "```"]
    return "\n".join(lines) + "\n"


def _tried(name: str) -> list[str]:
    """Return what the conformance suite tried on a method, found, and did not test."""
    record = conformance_of(name)
    if record is None:
        return ["Nothing yet: `make conformance` tries every method."]
    used = ", ".join(f"{package} {version}" for package, version in sorted(record.versions.items()))
    lines = [
        f"The conformance suite, version {record.suite}, with {record.source} and {used}, on random models of two or",
        f"three layers. {len(record.passed)} checks passed: {', '.join(f'`{check}`' for check in record.passed)}.",
    ]
    if record.models:
        header = ["model", "parameters", "start", "switched off", "restored", "merged", "loss"]
        rows = []
        for kind, found in record.models.items():
            gaps = (found.step0_difference, found.disabled_difference, found.reload_difference, found.merge_difference)
            cells = ["–" if gap is None else f"{gap:.1g}" for gap in gaps]
            loss = f"{found.first_loss:.3g} → {found.last_loss:.3g}"
            rows.append([kind, str(found.parameters), *cells, loss])
        lines += ["", "Largest differences of logits (which are about 5), and the loss over four steps:", ""]
        lines += _table(header, rows)
    lines += ["", "Not tested:", ""]
    lines += [f"- `{check}`: {reason}" for check, reason in record.not_tested.items()]
    return [*lines, *(f"- {text}" for text in UNTRIED)]


def _explained(kind: type[Method]) -> list[str]:
    """Return the docstring of the method's module, and of the modules that it refers to: equations, what is shared."""
    text = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    for name in re.findall(r":mod:`(\w+)`", text):
        shared = importlib.import_module(f"{kind.__module__.rpartition('.')[0]}.{name}").__doc__ or ""
        text = f"{text.replace(f':mod:`{name}`', 'below')}\n\n{inspect.cleandoc(shared)}"
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`").splitlines()


def _arm(name: str, kind: type[Method]) -> list[str]:
    """Return an arm of a study file with the size and the rate written out."""
    lines = ["arms:", f"  - method: {name}"]
    fields = kind.Config.model_fields
    shown = {key: _default(fields[key]) for key in ("rank", "alpha", kind.size) if key in fields}
    settings = ", ".join(f"{key}: {value}" for key, value in shown.items() if isinstance(value, int | float | str))
    if settings:
        lines.append(f"    config: {{{settings}}}")
    return [*lines, f"    train: {{learning_rate: {_number(kind.card.learning_rate)}}}"]


def _setting(key: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"`{_value(_default(field))}`"
    return [f"`{key}`", default, allowed(field), " ".join((field.description or "").replace("``", "`").split())]


def allowed(field: FieldInfo) -> str:
    """Return the values a setting may have: its type and the bounds of its field."""
    bounds = _bounds(field.metadata)
    return _kind(field.annotation) + (f", {', '.join(bounds)}" if bounds else "")


def _bounds(metadata: object) -> list[str]:
    entries = metadata if isinstance(metadata, list | tuple) else []
    found = []
    for entry in entries:
        found += [text.format(getattr(entry, name)) for name, text in BOUNDS.items() if hasattr(entry, name)]
        found += _bounds(getattr(entry, "metadata", []))
    return found


def _kind(annotation: Any) -> str:
    """Return a type in words."""
    names: Mapping[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    if annotation is type(None):
        return "null"
    parts = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        bounds = _bounds(annotation.__metadata__)
        return _kind(parts[0]) + (f" {', '.join(bounds)}" if bounds else "")
    origin = get_origin(annotation)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " or ".join(_kind(part) for part in parts)
    if str(origin) == "typing.Literal":
        return " or ".join(f"`{_value(part)}`" for part in parts)
    if origin in {tuple, list, frozenset}:
        return "list of " + re.sub(r"^(whole number|number|text)", r"\1s", _kind(parts[0]))
    if len(parts) == 2:
        return f"mapping from {_kind(parts[0])} to {_kind(parts[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(part) for part in value)}]"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


if __name__ == "__main__":
    write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/methods"))
