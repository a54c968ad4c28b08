"""Equations of a weight as text that is both read by people and computed: ``W + alpha / rank * lora_B @ lora_A``.

Statements are parted by ``;``. All but the last give a name to a value (``V = W + B @ A``), the last is the tuned
weight. ``*`` and ``/`` act entry by entry and broadcast, ``@`` multiplies matrices; names are those that the caller
gives values, functions those that the caller gives. Nothing else of Python is understood: a text can do no harm.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from peft_arena.core.errors import UserError, unknown

OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.MatMult: operator.matmul,
    ast.Pow: operator.pow,
}


def names_in(equation: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names whose values an equation needs, and the functions it calls.

    Raises:
        UserError: the text is no equation.
    """
    needed: set[str] = set()
    called: set[str] = set()
    given: set[str] = set()
    for target, value in _statements(equation):
        for node in ast.walk(value):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            elif isinstance(node, ast.Name):
                needed |= {node.id} - given
        given.add(target)
    return frozenset(needed - called), frozenset(called)


def compute(equation: str, values: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the value of an equation's last statement.

    Args:
        equation: see the module.
        values: of every name it needs: numbers, arrays or tensors.
        functions: those it may call.

    Raises:
        UserError: the text is no equation, or a name or function is not given.
    """
    held = dict(values)
    found: Any = None
    for target, value in _statements(equation):
        found = held[target] = _value(value, held, functions, equation)
    return found


def _statements(equation: str) -> list[tuple[str, ast.expr]]:
    """Return name and expression of each statement; the name of the last is empty."""
    try:
        tree = ast.parse(equation.replace(";", "\n").replace("\n ", "\n").strip())
    except SyntaxError as error:
        raise UserError(f"equation '{equation}' cannot be read: {error.msg}") from None
    found: list[tuple[str, ast.expr]] = []
    for place, node in enumerate(tree.body, 1):
        last = place == len(tree.body)
        if last and isinstance(node, ast.Expr):
            found.append(("", node.value))
        elif not last and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.append((node.targets[0].id, node.value))
        else:
            raise UserError(f"equation '{equation}': names are given values first, and the last part is the weight")
    if not found:
        raise UserError("an equation is empty; leave it out where there is none")
    return found


def _value(node: ast.expr, held: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], text: str) -> Any:
    where = f"equation '{text}'"
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sides = (_value(side, held, functions, text) for side in (node.left, node.right))
        return OPERATORS[type(node.op)](*sides)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, held, functions, text)
    if isinstance(node, ast.Constant) and type(node.value) in {int, float}:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in held:
            raise unknown("name", node.id, held, where)
        return held[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in functions:
            raise unknown("function", node.func.id, functions, where)
        return functions[node.func.id](*(_value(given, held, functions, text) for given in node.args))
    raise UserError(
        f"{where}: '{ast.unparse(node)}' cannot be computed; allowed: names, numbers, + - * / @ **, functions"
    )
