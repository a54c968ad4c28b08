"""What can be wrong with a file or a value: each kind is a function that breaks one, whatever stands there."""

import copy
import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_arena.core.bounded import MIB, RECORD_BYTES

Break = Callable[[Path], None]
DEEP = 100_000


def replaced(path: Path, content: bytes) -> None:
    """Put other content in the place of a file, which may be a hard link to a sound one."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _content(make: Callable[[bytes], bytes]) -> Break:
    return lambda path: replaced(path, make(path.read_bytes() if path.is_file() else b"{}"))


def _special(make: Callable[[Path], object]) -> Break:
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)

    return put


def _socket(path: Path) -> None:
    short = Path(os.path.relpath(path))  # a socket's name has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            listening.bind(short.name)
        finally:
            os.chdir(here)


def _sparse(size: int) -> Break:
    def put(path: Path) -> None:
        replaced(path, b"")
        with path.open("r+b") as handle:
            handle.truncate(size)

    return put


def _padded(path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b"{}"
    replaced(path, content)
    with path.open("ab") as handle:
        for _ in range(RECORD_BYTES // MIB + 1):
            handle.write(b" " * MIB)


PLACES: dict[str, Break] = {
    "directory": _special(lambda path: path.mkdir()),
    "pipe": _special(os.mkfifo),
    "device": _special(lambda path: path.symlink_to("/dev/zero")),
    "memory": _special(lambda path: path.symlink_to("/proc/self/mem")),
    "socket": _special(_socket),
    "loop": _special(lambda path: path.symlink_to(path.name)),
    "long name": _special(lambda path: path.symlink_to("x" * 3000)),
    "endless": _sparse(1 << 40),
}
"""What is no file stands in a file's place."""
BYTES: dict[str, Break] = {
    "empty": _content(lambda good: b""),
    "half": _content(lambda good: good[: len(good) // 2]),
    "zipped": _content(gzip.compress),
    "two bytes a letter": _content(lambda good: good.decode("utf-8", "replace").encode("utf-16")),
    "no text": _content(lambda good: good[:5] + b"\xff\xfe\x80" + good[5:]),
    "nulls": _content(lambda good: b"\0" * 100),
    "binary": _content(lambda good: bytes(range(256)) * 8),
}
"""The bytes are wrong, whatever the file is."""
JSON: dict[str, Break] = {
    "list": _content(lambda good: b"[1, 2]"),
    "text": _content(lambda good: b'"text"'),
    "null": _content(lambda good: b"null"),
    "deep": _content(lambda good: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep lists": _content(lambda good: b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "twice": _content(lambda good: b'{"kind": "run", "kind": "run", ' + good.lstrip()[1:]),
    "huge number": _content(lambda good: b'{"a": ' + b"9" * 400 + b", " + good.lstrip()[1:]),
    "huger number": _content(lambda good: b'{"a": ' + b"9" * 10_000 + b", " + good.lstrip()[1:]),
    "NaN alone": _content(lambda good: b"NaN"),
    "padding": _padded,
}
"""It is JSON, or looks like it."""


def of_json(change: Callable[[Any], object]) -> Break:
    """Return what changes the value that a JSON file holds."""

    def put(path: Path) -> None:
        table = json.loads(path.read_text(encoding="utf-8"))
        changed = copy.deepcopy(table)
        found = change(changed)
        assert changed != table or isinstance(found, dict), "the change must change something"
        replaced(path, json.dumps(found if isinstance(found, dict) else changed).encode())

    return put


def of_field(*keys: str | int, value: Any) -> Break:
    """Return what puts a value into a place of a JSON file."""

    def change(table: Any) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return of_json(change)


def _half(table: Any) -> None:
    """Leave half of the items, and let the headline be theirs."""
    items = table["items"] = table["items"][::2]
    values = [item["value"] for item in items if item["value"] is not None]
    table["metrics"][0].update(n=len(values), unscored=len(items) - len(values), value=sum(values) / len(values))


def _unscored(table: Any) -> None:
    """Take the value of every item, and leave a headline."""
    for item in table["items"]:
        item.update(value=None, others={}, reason="made up")
    table["metrics"][0].update(n=0, unscored=len(table["items"]), value=0.9, stderr=0.1)


def _measure(metric: str, **changed: Any) -> Break:
    """Return what changes one measure of a cost record."""
    return of_json(lambda t: next(m for m in t["measures"] if m["metric"] == metric).update(changed))


ANY = {"schema_version": 2, "unknown": 1}
EVALUATION: dict[str, Break] = {
    "other run": of_field("run_id", value="other-0123456789ab"),
    "no metrics": of_field("metrics", value=[]),
    "NaN item": of_field("items", 0, "value", value=float("nan")),
    "infinite item": of_field("items", 0, "value", value=float("inf")),
    "infinite weight": of_field("items", 0, "weight", value=float("inf")),
    "negative weight": of_field("items", 0, "weight", value=-1.0),
    "negative step": of_field("step", value=-1),
    "huge step": of_field("step", value=10**12),
    "step of 10^400": of_field("step", value=10**400),
    "text for a number": of_field("step", value="60"),
    "truth for a number": of_field("step", value=True),
    "null for a number": of_field("step", value=None),
    "fraction above 1": of_field("metrics", 0, "value", value=1.5),
    "fraction below 0": of_field("metrics", 0, "value", value=-0.5),
    "another mean": of_json(lambda t: t["metrics"][0].update(value=t["metrics"][0]["value"] / 2 + 0.3)),
    "another count": of_json(lambda t: t["metrics"][0].update(n=t["metrics"][0]["n"] + 1)),
    "an item twice": of_json(lambda t: t["items"].append(t["items"][0])),
    "an item less": of_json(lambda t: t["items"].pop()),
    "a field less": of_json(lambda t: t.pop("items")),
    "a field more": of_field("more", value=1),
    "newer": of_field("schema_version", value=2),
    "foreign spec": of_field("spec", "items", value=7),
    "half a character": of_field("engine", "version", value="\ud800"),
    "card of lists": of_field("card", "metrics", value=[1, 2]),
    "engine of lists": of_field("engine", "batch_size", value=[1]),
    "provenance": of_field("provenance", "git_commit", value=[1]),
    "half of the items": of_json(_half),
    "a mean of nothing": of_json(_unscored),
    "another error": of_field("metrics", 0, "stderr", value=0.4),
    "no error": of_field("metrics", 0, "stderr", value=None),
    "other direction": of_field("metrics", 0, "better", value="lower"),
    "other unit": of_field("metrics", 0, "unit", value="points"),
    "other metric": of_field("metrics", 0, "metric", value="foo"),
    "card of another version": of_field("card", "version", value=99),
    "chance of 9": of_field("card", "chance", value=9.0),
    "other arithmetic": of_field("engine", "dtype", value="bfloat17"),
    "fewer answers than values": of_field("written", value={"answers": 3, "met_limit": 3, "limit": 8}),
    "limit of no token": of_field("written", value={"answers": 10**6, "met_limit": 3, "limit": 0}),
    "truth for a version": _content(lambda good: good.replace(b'"schema_version": 1', b'"schema_version": true')),
    "other kind": of_field("kind", value="run"),
    "kind is a list": of_field("kind", value=[]),
}
TRAINING: dict[str, Break] = {
    "negative steps": of_field("steps", value=-1),
    "huge steps": of_field("steps", value=10**30),
    "save points backwards": of_field("save_points", value=[60, 30]),
    "save point beyond": of_field("save_points", value=[10**9]),
    "loss is NaN": of_field("log", 0, "loss", value=float("nan")),
    "log backwards": of_json(lambda t: t["log"].reverse()),
    "negative tokens": of_field("tokens", value=-5),
    "steps of another schedule": of_field("steps", value=999),
    "loss below 0": of_field("log", 0, "loss", value=-5.0),
    "tokens of another length": of_json(lambda t: t.update(tokens=10**15, padded_tokens=10**15)),
    "training of another": of_field("run_id", value="x"),
}
COST: dict[str, Break] = {
    "seconds below 0": of_json(lambda t: next(m for m in t["measures"] if m["unit"] == "seconds").update(value=-1.0)),
    "seconds NaN": of_field("measures", 0, "value", value=float("nan")),
    "no direction": of_field("measures", 0, "better", value="sideways"),
    "more trained than there are": _measure("trained_parameters", value=9e15),
    "another share": _measure("trained_share", value=0.99),
    "operations below 0": _measure("training_flops", value=-5.0),
    "another unit": _measure("training_time", unit="bytes"),
    "no measures": of_field("measures", value=[]),
    "a measure twice": of_json(lambda t: t["measures"].append({**t["measures"][0], "value": 1.0})),
    "cost of another": of_field("run_id", value="x"),
    "another stage": of_field("stage", value="inference"),
}
RUN: dict[str, Break] = {
    "another seed": of_field("spec", "seed", value=5),
    "no date": of_field("created", value="yesterday"),
    "date is a number": of_field("created", value=5),
    "no spec": of_json(lambda t: t.pop("spec")),
    "seed is a text": of_field("spec", "seed", value="0"),
}

STUDY = """name: malformed
title: A study
model: {name: micro}
targets: [{task: micro-reverse}]
retention: [{task: micro-facts, items: 4}]
train: {schedule: {steps: 2}, learning_rate: 1e-3}
arms: [{method: lora, config: {rank: 2}}]
seeds: [0]
"""


def laughs(letters: int = 12) -> str:
    """Return YAML whose aliases stand for 9^letters values."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for number in range(1, letters):
        text += f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n"
    return text


YAML: dict[str, str] = {
    "aliases": laughs() + STUDY,
    "alias of itself": STUDY + "x: &x [*x]\n",
    "deep YAML": STUDY + "x: " + "[" * 5000 + "]" * 5000,
    "deep braces": STUDY + "x: " + "{a: " * 2000 + "1" + "}" * 2000,
    "key twice": STUDY + "title: again\n",
    "tag of Python": STUDY.replace("A study", "!!python/object/apply:os.system [true]"),
    "tag of a set": STUDY.replace("[0]", "!!set {0}"),
    "merge key": STUDY + "more: &m {a: 1}\nrl: {<<: *m}\n",
    "tab": STUDY + "rl:\n\t- 1\n",
    "control character": STUDY.replace("A study", "A\x01study"),
    "null character": STUDY.replace("A study", '"A\\0study"'),
    "half a character": STUDY.replace("A study", '"\\ud800"'),
    "octal": STUDY.replace("seeds: [0]", "seeds: [010]"),
    "base sixty": STUDY.replace("steps: 2", "steps: 1:30"),
    "date": STUDY.replace("A study", "2020-01-01"),
    "moment": STUDY.replace("seeds: [0]", "seeds: [2020-01-01 10:00:00]"),
    "binary value": STUDY.replace("A study", "!!binary aGk="),
    "no anchor": STUDY + "rl: *nothing\n",
    "two documents": STUDY + "---\na: 1\n",
    "list on top": "- a\n- b\n",
    "key of a list": STUDY + "? [a, b]\n: 1\n",
    "long": STUDY + "#" * (3 << 20),
}
VALUES: dict[str, str] = {
    "NaN": ".nan",
    "infinity": ".inf",
    "minus infinity": "-.inf",
    "beyond floats": "1e999",
    "negative": "-3",
    "beyond 64 bits": "9" * 30,
    "10^400": "9" * 400,
    "10^5000": "9" * 5000,
    "word": "many",
    "list for one": "[1, [2]]",
    "mapping for one": "{a: {b: 1}}",
    "long word": "x" * 5000,
    "zero": "0",
    "truth": "[true, false]",
    "null character": '"\\0"',
}
"""Values of a setting that takes a number."""
TEMPLATES: dict[str, str] = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop of messages": "{% for m in messages %}{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 10 ** 11 }}",
    "repeated list": "{% set x = [0] * 10 ** 10 %}",
    "power": "{% set x = 9 ** 9 ** 9 ** 9 %}{{ x ** x }}",
    "growing": "{% set n = namespace(x='ab') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "macro of itself": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "wide": "{{ 'a' | center(10 ** 11) }}",
    "broken": "{% for",
    "no such thing": "{{ messages.nothing.at.all }}",
}
"""Chat templates."""
DATA: dict[str, bytes] = {
    "nested row": b'{"question": ' + b"[" * DEEP + b"]" * DEEP + b', "answer": "x"}\n',
    "row NaN": b'{"question": NaN, "answer": "x"}\n',
    "row of a list": b"[1, 2]\n",
    "row huge number": b'{"question": "q", "answer": ' + b"9" * 9999 + b"}\n",
    "half row": b'{"question": "q", "answer": "a"}\n{"question": "q2", "ans',
    "row half a character": b'{"question": "\\ud800", "answer": "a"}\n',
    "row key twice": b'{"question": "q", "question": "r", "answer": "a"}\n',
    "no rows": b"\n\n",
}
"""Rows of JSON lines."""
