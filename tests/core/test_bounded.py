"""Files that somebody else wrote are read within bounds, and settings hold plain values only."""

import errno
import os
import time
from datetime import datetime

import pytest

from peft_arena.core.bounded import deeper, parse_json, present, read_bytes, read_json, read_table, user_path
from peft_arena.core.errors import UserError
from peft_arena.core.foreign import reading
from peft_arena.core.ids import file_hash
from peft_arena.core.limits import time_limit
from peft_arena.core.plain import check_plain
from peft_arena.core.text import one_line, shown
from peft_arena.core.yamlfile import YamlFile, parse_scalar
from tests.faults.malformed_kinds import BYTES, JSON, PLACES, VALUES, YAML


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, kind):
    path = tmp_path / "a.json"
    PLACES[kind](path)
    assert present(path), "a link that leads nowhere is something that stands there"
    for read in (read_json, read_table, YamlFile, file_hash):
        assert "a.json" in refusal(read, path)


@pytest.mark.parametrize("kind", {**BYTES, **JSON})
def test_what_is_no_object_of_json_is_refused(tmp_path, kind):
    path = tmp_path / "a.json"
    path.write_text('{"kind": "run", "letters": "ab"}')
    if kind == "padding":  # of 200 MiB, tried once below
        return
    {**BYTES, **JSON}[kind](path)
    if kind == "huge number":  # what is settings' own business: lengths of 31 digits are usual
        assert "400 digits" in refusal(read_table, path)
        return
    assert "a.json" in refusal(read_table, path)


def test_a_long_file_is_not_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 11)
    assert refusal(read_bytes, path, 10).endswith("it holds 11 bytes, and at most 10 are read")
    assert read_bytes(path, 11) == b"x" * 11
    assert refusal(file_hash, path, 10).endswith("it holds 11 bytes, and at most 10 are read")


def test_infinity_is_no_json_and_yet_stands_in_settings_of_models(tmp_path):
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_table(tmp_path / "config.json")["time_step_limit"][1] == float("inf")
    for text in ("[NaN]", "[Infinity]", "[1e999]", '{"a": 1, "a": 1}', "[" * 10**5):
        with pytest.raises(ValueError, match="NaN|Infinity|too large|twice|too deep"):
            parse_json(text)


def test_depth_is_counted():
    assert not deeper([[[1]]], 3) and deeper([[[1]]], 2) and not deeper("x", 0) and deeper([{"a": []}], 2)


@pytest.mark.parametrize("kind", YAML)
def test_yaml_ends_in_a_line_of_its_file_or_is_read(tmp_path, kind):
    path = tmp_path / "s.yaml"
    path.write_text(YAML[kind])
    if kind in {"merge key", "date"}:  # read as what they are, and refused as settings
        assert YamlFile(path).data
    else:
        assert "s.yaml" in refusal(YamlFile, path)


@pytest.mark.parametrize("text", ["08", "0o17", "1:30", "010", "1_0:20", "-017"])
def test_numbers_to_another_base_are_never_read_silently(text):
    try:
        assert isinstance(parse_scalar(text), str)
    except UserError as error:
        assert text in str(error)


def test_plain_numbers_and_words_are_what_they_were():
    values = {"1_000": 1000, "0": 0, "0.5": 0.5, "1e-3": 1e-3, "0x10": 16, "-3": -3, "00:11": "00:11", "v1:2": "v1:2"}
    assert {text: parse_scalar(text) for text in values} == values


@pytest.mark.parametrize("kind", ["NaN", "infinity", "beyond floats", "beyond 64 bits", "10^5000", "null character"])
def test_values_no_setting_can_have_are_refused(kind):
    refusal(parse_scalar, VALUES[kind])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "a.0: must be a finite number"),
        (1 << 63, "64 bits"),
        (b"x", "got bytes"),
        (datetime(2020, 1, 1), "got datetime"),
        ({1: 2}, ""),
        ("\ud800", "whole characters"),
        ({1, 2}, "got set"),
    ],
)
def test_settings_are_plain(value, says):
    if says:
        assert says in refusal(check_plain, {"a": [value]})
    else:
        check_plain({"a": [value]})


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 3000, "a\0b", "~nobody-has-this-name/x"])
def test_names_that_no_file_can_have(name):
    assert "cannot be the name of a file" in refusal(user_path, name)
    assert user_path("x" * 255).name == "x" * 255


def test_what_is_shown_is_one_line_that_can_be_printed():
    assert shown("a\nb\x1b[0m\ud800") == "a\\nb\\x1b[0m\\ud800"
    assert shown("x" * 1000).endswith("... (1000 characters)")
    assert one_line("a\n b\ud800").encode() == b"a b\\ud800"


def test_what_a_library_raises_is_a_line_and_a_panic_too():
    class PanicException(BaseException):
        """What Rust's libraries raise."""

    for error in (KeyError("x"), PanicException("y"), ValueError("z"), FileNotFoundError("w")):
        with pytest.raises(UserError, match="^cannot read it: "), reading("cannot read it"):
            raise error
    with pytest.raises(KeyboardInterrupt), reading("cannot read it"):
        raise KeyboardInterrupt
    for refusal in (MemoryError(), OSError(errno.ENOSPC, "No space left on device")):  # says nothing of the file
        with pytest.raises(type(refusal)), reading("cannot read it"):
            raise refusal


def test_what_takes_too_long_is_interrupted():
    import re

    with pytest.raises(TimeoutError, match=r"takes more than 0\.05 s"), time_limit(0.05):
        re.fullmatch("(a+)+b", "a" * 40)
    with time_limit(0.001), time_limit(0.001):
        pass
    before = time.process_time()
    while time.process_time() < before + 0.01:
        os.getpid()  # no limit outlives its block
