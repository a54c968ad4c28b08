"""How answers to PEFT-Bench's data sets are read: numbers, words in common, arithmetic. Nothing is executed."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from peft_arena.tasks.scorers import FINAL_ANSWER_MARK, extract_number

LARGEST = 5.0
"""Highest score of STS-B; the lowest is 0."""
EQUATION_CHARACTERS = 200
"""A longer answer to SVAMP is no equation."""
THOUGHT = "</think>"
"""What ends a thought before an answer."""
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")


def plain(completion: str) -> str:
    """Return what follows a thought, if there is one, without white space around it and in lower case."""
    return completion.rpartition(THOUGHT)[2].strip().lower()


def marked_number(text: str) -> str:
    """Return the number right after the last mark by value, in canonical form; empty without one."""
    return extract_number(text) if FINAL_ANSWER_MARK in text else ""


def similarity(said: str) -> float | None:
    """Return the number an answer is, cut to the range of STS-B; None if it is none."""
    return min(max(float(said), 0.0), LARGEST) if NUMBER.fullmatch(said) else None


def farther_end(gold: float) -> float:
    """Return the end of the range of STS-B that is farther from a gold number."""
    return 0.0 if gold >= LARGEST / 2 else LARGEST


def words_f1(gold: Sequence[str], said: Sequence[str]) -> float:
    """Return the F1 of two bags of words (Rajpurkar et al. 2016, SQuAD); 1 where both are empty."""
    if not gold or not said:
        return float(list(gold) == list(said))
    return 2 * (Counter(gold) & Counter(said)).total() / (len(gold) + len(said))


def parenthesised(text: str) -> bool:
    """Say whether one pair of parentheses is around the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return False
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark == "(") - (mark == ")")
        if depth == 0 and place < len(text) - 1:
            return False
    return depth == 0


def arithmetic(text: str) -> Fraction | None:
    """Return the exact value of sums, differences, products and quotients of decimal numbers; None for all else."""
    tree = _tree(text)
    try:
        return None if tree is None else _value(tree)
    except (ValueError, ZeroDivisionError):
        return None


def canonical(text: str) -> str:
    """Return arithmetic in a form that is the same for any order within a sum or a product of two."""
    tree = _tree(text)
    return "" if tree is None else _form(tree)


def close(value: Fraction, gold: Fraction) -> bool:
    """Say whether two numbers differ by less than a millionth."""
    return abs(value - gold) < Fraction(1, 10**6)


def _tree(text: str) -> ast.expr | None:
    if len(text) > EQUATION_CHARACTERS or not _ARITHMETIC.fullmatch(text):
        return None
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            return -_value(operand) if isinstance(sign, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise ValueError(f"no arithmetic: {type(node).__name__}")


def _form(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        sides = [_form(node.left), _form(node.right)]
        ordered = sorted(sides) if isinstance(node.op, ast.Add | ast.Mult) else sides
        return f"{type(node.op).__name__}({', '.join(ordered)})"
    if isinstance(node, ast.UnaryOp):
        return f"{type(node.op).__name__}({_form(node.operand)})"
    return str(Fraction(str(node.value))) if isinstance(node, ast.Constant) else ""
