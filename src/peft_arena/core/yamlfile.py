"""Read a YAML file and remember the line of every key, so that a complaint can say where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peft_arena.core.errors import UserError

KeyPath = tuple[str | int, ...]


class YamlFile:
    """A parsed YAML mapping; ``locate`` gives the line of any key path inside it."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: missing, not YAML, a key stated twice, or not a mapping.
        """
        self.path = path
        self._lines: dict[KeyPath, int] = {}
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if node is None:
                raise UserError(f"{path} is empty")
            self.data: dict[str, Any] = self._value(node, ())
        except FileNotFoundError:
            raise UserError(f"no file {path}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: byte {error.start}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f" line {mark.line + 1}" if mark is not None else ""
            raise UserError(f"{path}{line} is not valid YAML: {error.problem or error.context}") from None
        except RecursionError:
            raise UserError(f"{path} is not valid YAML: it contains itself, or is nested too deeply") from None
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(self.data, dict):
            raise UserError(f"{path} must hold a mapping of keys to values, got {type(self.data).__name__}")

    def locate(self, path: KeyPath) -> str:
        """Return ``file line N`` of a key path, of its nearest parent if the key itself is absent."""
        while path and path not in self._lines:
            path = path[:-1]
        return f"{self.path} line {self._lines[path]}" if path in self._lines else str(self.path)

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            table: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise UserError(f"{self.path} line {line}: a key must be a plain word")
                if key in table:
                    raise UserError(f"{self.path} line {line}: key '{key}' is stated twice")
                self._lines[(*path, key)] = line
                table[key] = self._value(value_node, (*path, key))
            return table
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, index)) for index, child in enumerate(node.value)]
        return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    value = yaml.SafeLoader("").construct_object(node)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return _number(value) if plain and isinstance(value, str) else value


def _number(text: str) -> float | str:
    """Read ``1e-3`` as the number it is everywhere outside YAML 1.1."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", text) else text


def parse_scalar(text: str) -> Any:
    """Read one value as a study file would: ``1e-3`` is a number, ``[0, 1]`` a list, ``null`` nothing.

    Raises:
        UserError: the text is not a YAML value.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"'{text}' is not a value") from None
    return _number(value) if isinstance(value, str) else value
