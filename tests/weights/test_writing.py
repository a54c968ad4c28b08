"""Safetensors files written tensor by tensor, and directories that are whole or absent."""

import json
import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peft_arena.core.errors import UserError
from peft_arena.weights.files import TensorFiles, model_files
from peft_arena.weights.writing import CODES, Entry, new_directory, plan_shards, read_size, write_model, write_tensors

SHAPES = {"a": (3, 5), "scalar": (), "empty": (0, 4), "vector": (7,), "cube": (2, 3, 4)}


def values(dtype):
    torch.manual_seed(0)
    return {name: (100 * torch.randn(shape)).to(dtype) for name, shape in SHAPES.items()}


def entries_of(tensors):
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("dtype", sorted(CODES, key=str), ids=str)
def test_the_library_reads_what_was_written(dtype, tmp_path):
    tensors = values(dtype)
    file = tmp_path / "x.safetensors"
    write_tensors(file, entries_of(tensors), lambda entry: [tensors[entry.name]])
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_types_of_several_widths_are_aligned(tmp_path):
    tensors = {"b": torch.tensor([True, False, True]), "h": torch.randn(5).half(), "d": torch.randn(3).double()}
    file = tmp_path / "x.safetensors"
    write_tensors(file, entries_of(tensors), lambda entry: [tensors[entry.name]])
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    table = json.loads(raw[8 : 8 + length])
    assert all(table[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors.items())


def test_parts_follow_each_other(tmp_path):
    tensor = torch.randn(10, 3)
    file = tmp_path / "x.safetensors"
    write_tensors(file, [Entry("t", torch.float32, (10, 3))], lambda entry: iter(tensor.split(4)))
    assert torch.equal(load_file(file)["t"], tensor)


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(3, dtype=torch.float16)])
def test_a_tensor_that_is_not_as_announced_is_an_error(wrong, tmp_path):
    with pytest.raises(ValueError, match="t is announced"):
        write_tensors(tmp_path / "x", [Entry("t", torch.float32, (3,))], lambda entry: [wrong])


def test_shards_keep_to_their_limit_and_the_index_names_them(tmp_path):
    tensors = {f"t{number}": torch.randn(number + 1) for number in range(6)}
    files = write_model(tmp_path, entries_of(tensors), lambda entry: [tensors[entry.name]], limit=24)
    assert [file.name for file in files] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    found = model_files(tmp_path)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 84, "total_parameters": 21}
    assert {name: TensorFiles((tmp_path / file,)).shapes[name] for name, file in index["weight_map"].items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_a_tensor_above_the_limit_is_alone():
    sizes = [Entry(str(number), torch.uint8, (size,)) for number, size in enumerate((2, 9, 2, 3))]
    assert [[entry.size for entry in shard] for shard in plan_shards(sizes, 5)] == [[2], [9], [2, 3]]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500), ("77", 77)]
)
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "0.5"])
def test_a_size_that_is_none(text):
    with pytest.raises(UserError, match="a shard size is a number of bytes"):
        read_size(text)


def test_a_directory_is_there_only_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(UserError, match="stop"), new_directory(out) as part:
        (part / "file").write_text("half")
        raise UserError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_directory(out) as part:
        assert not out.exists()
        (part / "file").write_text("all")
    assert [file.name for file in tmp_path.rglob("*")] == ["deep", "out", "file"]


def test_an_empty_directory_is_taken_and_a_full_one_is_not(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_directory(out) as part:
        (part / "file").write_text("first")
    with pytest.raises(UserError, match="exists and is not empty"), new_directory(out):
        raise AssertionError("not reached")
    assert (out / "file").read_text() == "first"
    with pytest.raises(UserError, match="is not a directory"), new_directory(out / "file"):
        raise AssertionError("not reached")


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**6))
    with new_directory(tmp_path / "small", needed=10**6):
        pass
    wanted = r"not enough room .* 0.01 GB are needed, 0.01 GB are free"
    with pytest.raises(UserError, match=wanted), new_directory(tmp_path / "large", needed=10**7):
        raise AssertionError("not reached")
    assert [found.name for found in tmp_path.iterdir()] == ["small"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        wanted = "cannot write .* File too large; nothing was written"
        with pytest.raises(UserError, match=wanted) as caught, new_directory(tmp_path / "out") as part:
            entry = Entry("t", torch.float32, (1000,))
            write_tensors(part / "x.safetensors", [entry], lambda entry: [torch.zeros(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_inside_a_run(tmp_path):
    (tmp_path / "runs" / "run-1").mkdir(parents=True)
    (tmp_path / "runs" / "run-1" / "run.json").write_text("{}")
    for out in ("run-1/out", "run-1/steps/deep/out"):
        with pytest.raises(UserError, match="is inside the run run-1"), new_directory(tmp_path / "runs" / out):
            raise AssertionError("not reached")
    assert [file.name for file in (tmp_path / "runs" / "run-1").iterdir()] == ["run.json"]
    with new_directory(tmp_path / "runs" / "beside"):
        pass


def test_a_file_that_cannot_be_read_is_not_said_to_be_written(tmp_path):
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}/source: No such file") as caught:  # noqa: SIM117
        with new_directory(tmp_path / "out") as part:
            shutil.copyfile(tmp_path / "source", part / "copy")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/out: No such file"):  # noqa: SIM117
        with new_directory(tmp_path / "out") as part:
            (part / "no" / "file").write_text("x")


def test_errors_name_what_is_to_be_made_or_what_it_is_made_from(tmp_path):
    for source, name in ((None, "out"), (tmp_path / "from", "from")):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}/file is damaged$"):  # noqa: SIM117
            with new_directory(tmp_path / "out", source=source) as part:
                raise UserError(f"{part / 'file'} is damaged")


def test_a_process_that_is_told_to_end_leaves_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, new_directory(tmp_path / "out") as part:
        (part / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
