"""Read a YAML file and remember the line of every key, so that a complaint can say where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peft_arena.core.bounded import MIB, read_text
from peft_arena.core.errors import UserError
from peft_arena.core.plain import DEEPEST, MOST, KeyPath, check_plain
from peft_arena.core.text import shown

LONGEST = MIB
"""Most bytes of a YAML file."""
_MAPPING, _LIST = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_OTHER_BASE = re.compile(r"[+-]?(0[0-7_]*[0-7]|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")
"""Whole numbers that begin with 0 and numbers with colons, which YAML 1.1 reads to the bases 8 and 60."""


class YamlFile:
    """A parsed YAML mapping; ``locate`` gives the line of any key path inside it."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: missing, no regular file, too long, not YAML, a key stated twice, not a mapping, a value that
                settings cannot have (see :func:`peft_arena.core.plain.check_plain`), or too many values by aliases.
        """
        self.path = path
        self._lines: dict[KeyPath, int] = {}
        self._count = 0
        text = read_text(path, LONGEST)
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if node is None:
                raise UserError(f"{path} is empty")
            self.data: dict[str, Any] = self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f" line {mark.line + 1}" if mark is not None else ""
            raise UserError(f"{path}{line} is not valid YAML: {shown(error.problem or error.context)}") from None
        except RecursionError:
            raise UserError(f"{path} is not valid YAML: it contains itself, or is nested too deeply") from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not valid YAML: {shown(str(error).splitlines()[0])}") from None
        if not isinstance(self.data, dict):
            raise UserError(f"{path} must hold a mapping of keys to values, got {type(self.data).__name__}")
        check_plain(self.data, self.locate)

    def locate(self, path: KeyPath) -> str:
        """Return ``file line N`` of a key path, of its nearest parent if the key itself is absent."""
        while path and path not in self._lines:
            path = path[:-1]
        return f"{self.path} line {self._lines[path]}" if path in self._lines else str(self.path)

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        self._count += 1
        if self._count > MOST:
            raise UserError(f"{self.path} holds more than {MOST:,} values, those that aliases repeat among them")
        if len(path) > DEEPEST:
            raise UserError(
                f"{self.path} line {line} is not valid YAML: it is nested more than {DEEPEST} deep, or contains itself"
            )
        usual = _MAPPING if isinstance(node, yaml.MappingNode) else _LIST if isinstance(node, yaml.SequenceNode) else ""
        if usual and node.tag != usual:
            raise UserError(f"{self.path} line {line}: the tag {shown(node.tag)} is not allowed; leave it out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, index)) for index, child in enumerate(node.value)]
        try:
            return _scalar(node)
        except _BaseError as error:
            raise UserError(f"{self.path} line {line}: {error}") from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.path} line {line}: a key must be a plain word")
            if key in table:
                raise UserError(f"{self.path} line {line}: key '{shown(key)}' is stated twice")
            self._lines[(*path, key)] = line
            table[key] = self._value(value_node, (*path, key))
        return table


class _BaseError(Exception):
    """A number that YAML 1.1 reads to another base than ten."""


def _scalar(node: yaml.Node) -> Any:
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and _OTHER_BASE.fullmatch(node.value) and not node.tag.endswith(":str"):
        raise _BaseError(
            f"YAML reads {shown(node.value)} as a number to another base; write it to base ten, or a text in quotes"
        )
    value = yaml.SafeLoader("").construct_object(node)
    return _number(value) if plain and isinstance(value, str) else value


def _number(text: str) -> float | str:
    """Read ``1e-3`` as the number it is everywhere outside YAML 1.1."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", text) else text


def parse_scalar(text: str) -> Any:
    """Read one value as a study file would: ``1e-3`` is a number, ``[0, 1]`` a list, ``null`` nothing.

    Raises:
        UserError: the text is not a YAML value, or one that settings cannot have.
    """
    wrong = UserError(f"'{shown(text)}' is not a value")
    if len(text) > LONGEST or _OTHER_BASE.fullmatch(text.strip()):
        raise wrong
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError):
        raise wrong from None
    value = _number(value) if isinstance(value, str) else value
    check_plain({"value": value})
    return value
