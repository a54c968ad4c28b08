"""Injected faults: each ends in a clear line and a sound directory, and what resumes has the undisturbed numbers."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peft_arena.commands.check import check_path
from peft_arena.core.errors import UserError
from peft_arena.train.loss import LossParts
from tests.running import results

from .faulty import (
    CRASHED,
    REFUSED,
    STUDY,
    at_call,
    from_call,
    half_written,
    in_child,
    killed,
    killed_after,
    raised,
    refused,
    work_on,
)

Fault = Callable[[Path], None]
"""Called in the child before it works, with the runs directory."""
KILLED = "killed"


def call(owner: str, name: str, number: int, act: Callable[..., object], where: str = "", ever: bool = False) -> Fault:
    """Return the fault of a call; the owner is a module's name, or ``module:class``."""

    def inject(runs: Path) -> None:
        import importlib

        module, _, kind = owner.partition(":")
        found = importlib.import_module(module)
        (from_call if ever else at_call)(getattr(found, kind) if kind else found, name, number, act, where)

    return inject


def small_files(runs: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def few_files(runs: Path) -> None:
    taken = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    soft = [number for number in range(1000) if number not in taken][2]  # two more
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def clock_jumps_back(runs: Path) -> None:
    began = time.time()
    at = [began]

    def jumping() -> float:
        at[0] -= 3600.0
        return at[0]

    time.time = jumping


def no_home(runs: Path) -> None:
    os.environ.update(HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere")


def no_temporary_files(runs: Path) -> None:
    os.environ["TMPDIR"] = "/proc/nowhere"
    tempfile.tempdir = None


def no_git(runs: Path) -> None:
    os.environ["PATH"] = "/proc/nowhere"


def own_exit(runs: Path) -> None:
    call(MICRO, "score", 2, lambda *given, **named: os._exit(0))(runs)


def not_a_number(function: Callable[..., LossParts], *given: object, **named: object) -> LossParts:
    parts = function(*given, **named)
    return parts._replace(nats=parts.nats * float("nan"))


MICRO = "peft_arena.tasks.micro.base:MicroTask"
FAULTS: dict[str, tuple[Fault, str]] = {
    "killed before run.json": (call("os", "link", 1, killed, "run.json"), KILLED),
    "killed before the training record": (call("os", "link", 1, killed, "training.json"), KILLED),
    "killed after the training record": (call("os", "link", 1, killed_after, "training.json"), KILLED),
    "killed before an evaluation's record": (call("os", "link", 1, killed, "eval-micro-reverse"), KILLED),
    "killed after an evaluation's record": (call("os", "link", 2, killed_after, "eval-"), KILLED),
    "killed before the cost's record": (call("os", "link", 1, killed, "cost-inference"), KILLED),
    "killed while a checkpoint is written": (
        call("peft_arena.store.checkpoint", "file_hash", 1, killed, "/steps/"), KILLED
    ),
    "killed before a checkpoint is moved": (call("os", "rename", 1, killed, "/steps/"), KILLED),
    "killed after a checkpoint is moved": (call("os", "rename", 2, killed_after, "/steps/"), KILLED),
    "killed while a resume state is written": (call("os", "rename", 3, killed, "/resume/"), KILLED),
    "killed while an old resume state goes": (
        call("peft_arena.train.state:shutil", "rmtree", 2, killed, "/resume/"), KILLED
    ),
    "killed in a step": (call("torch.optim:AdamW", "step", 3, killed), KILLED),
    "killed while the model is loaded": (call("peft_arena.models.load", "load", 1, killed), KILLED),
    "killed while it scores": (call(MICRO, "score", 3, killed), KILLED),
    "killed in the middle of a line of the log": (call("os", "write", 2, half_written, "started"), KILLED),
    "no space when a record is synced": (call("os", "fsync", 1, refused(errno.ENOSPC)), "No space left on device"),
    "no space for any record": (call("os", "fsync", 2, refused(errno.ENOSPC), ever=True), "No space left on device"),
    "an input or output error in a checkpoint": (
        call("peft_arena.store.checkpoint", "sync", 2, refused(errno.EIO)),
        "cannot write checkpoint .*Input/output error"
    ),
    "a quota is full": (call("os", "link", 2, refused(errno.EDQUOT)), "Disk quota exceeded"),
    "a checkpoint cannot be moved": (call("os", "rename", 1, refused(errno.EIO), "/steps/"), "Input/output error"),
    "the file system turns read-only": (
        call("os", "open", 4, refused(errno.EROFS), "events.jsonl", ever=True), "Read-only"
    ),
    "no permission for a record's directory": (
        call("os", "mkdir", 1, refused(errno.EACCES), "records"), "Permission denied"
    ),
    "a line of the log is cut by a full disk": (
        call("os", "write", 3, lambda write, handle, data: write(handle, data[:9]), "event"), "is the disk full"
    ),
    "files may not be large": (small_files, "File too large"),
    "too many open files": (few_files, "Too many open files"),
    "out of memory in a step": (call("torch.optim:AdamW", "step", 2, raised(MemoryError())), "train: MemoryError"),
    "out of memory in an evaluation": (
        call(MICRO, "score", 2, raised(MemoryError("no more"))), "no more"
    ),
    "the device is lost": (
        call("torch.optim:AdamW", "step", 2, raised(RuntimeError("device lost\nand more"))),
        "train: RuntimeError: device lost$"
    ),
    "the loss is not a number": (call("peft_arena.train.loss:TokenLoss", "__call__", 2, not_a_number), "loss"),
    "a method fails": (
        call("peft_arena.methods.low_rank.lora:Lora", "attach", 1, raised(ValueError("no rank"))),
        "train: ValueError: no rank",
    ),
    "a task has no items": (
        call(MICRO, "items", 1, raised(KeyError("split"))), "KeyError: 'split'"
    ),
    "too many open files in a scorer": (call(MICRO, "score", 2, refused(errno.EMFILE)), "Too many open files"),
    "no space in a prompt": (call(MICRO, "prompt", 5, refused(errno.ENOSPC)), "No space left on device"),
}  # fmt: skip
LEAVES_NOTHING = {
    "killed after a checkpoint is moved",
    "killed while an old resume state goes",
    "killed in a step",
    "killed while the model is loaded",
    "killed while it scores",
    "killed in the middle of a line of the log",
}
"""Kills at which no file or directory was being written."""
HARMLESS: dict[str, Fault] = {
    "the clock jumps back": clock_jumps_back,
    "the home directory cannot be written": no_home,
    "the directory of temporary files is gone": no_temporary_files,
    "there is no git": no_git,
    "an interrupted look into the directory": call("os", "scandir", 1, refused(errno.EIO)),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "faulty.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def undisturbed(study: Path) -> dict[str, object]:
    """What the study gives when nothing happens."""
    import peft_arena.work.preload  # noqa: F401 - loaded once, here, for all children

    runs = study.parent / "runs"
    ended = in_child(lambda: work_on(study, runs), study.parent / "said")
    assert ended.code == 0, ended.text
    found = results(runs)
    assert len(found) > 6
    return found


def is_sound(runs: Path) -> None:
    """What is there is whole; a directory without any record yet is sound too."""
    if not runs.exists():
        return
    try:
        check_path(runs)
    except UserError as error:
        assert "it holds no records and no checkpoints" in str(error)


def resumes(study: Path, runs: Path, undisturbed: dict[str, object]) -> None:
    """The same again, without a fault, ends well with the same numbers, and leaves nothing unfinished."""
    before = {path: path.read_bytes() for path in runs.glob("*/records/**/*.json")}
    ended = in_child(lambda: work_on(study, runs), study.parent / "said")
    assert ended.code == 0, ended.text
    assert results(runs) == undisturbed
    assert all(path.read_bytes() == text for path, text in before.items()), "a finished record was changed"
    assert not list(runs.rglob("*.part"))
    assert "left_by_killed_writers" not in check_path(runs)


def named(value: object) -> str:
    """Return what a parameter is called in the name of a test, the same in every process."""
    return str(getattr(value, "__name__", value))


@pytest.mark.deep
@pytest.mark.spread
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(name: str, study: Path, undisturbed: dict[str, object], tmp_path: Path) -> None:
    inject, expected = FAULTS[name]
    runs = tmp_path / "runs"

    def disturbed() -> None:
        inject(runs)
        work_on(study, runs)

    ended = in_child(disturbed, tmp_path / "said")
    if expected == KILLED:
        assert ended == (-signal.SIGKILL, "")
        left = {path.relative_to(runs).as_posix() for path in runs.rglob("*.part")}
        assert bool(left) == (name not in LEAVES_NOTHING), left
        if list(runs.glob("*/run.json")):
            assert set(check_path(runs).get("left_by_killed_writers", [])) == left
    else:
        assert ended.code == REFUSED, ended.text
        assert "Traceback" not in ended.text and len(ended.text.splitlines()) == 1, ended.text
        assert re.search(expected, ended.text.strip()), ended.text
    is_sound(runs)
    resumes(study, runs, undisturbed)


@pytest.mark.deep
@pytest.mark.spread
@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing(name: str, study: Path, undisturbed: dict[str, object], tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def disturbed() -> None:
        HARMLESS[name](runs)
        work_on(study, runs)

    ended = in_child(disturbed, tmp_path / "said")
    assert ended.code == 0 and "Traceback" not in ended.text, ended.text
    assert results(runs) == undisturbed
    resumes(study, runs, undisturbed)


def spoil(runs: Path, pattern: str, change: Callable[[Path], object]) -> Path:
    """Change a file of a run that was killed or is done."""
    (file,) = sorted(runs.glob(pattern))[-1:]
    change(file)
    return file


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_moments(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    from peft_arena.core.ids import file_hash

    held = load_file(file)
    save_file({f"9{name}": tensor for name, tensor in held.items()}, file)
    sums = file.parent / "SHA256"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(file.name)]
    sums.write_text("\n".join([*lines, f"{file_hash(file)}  {file.name}"]) + "\n")


@pytest.mark.deep
@pytest.mark.spread
@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("*/resume/*/weights.safetensors", halve),
        ("*/resume/*/counters.json", halve),
        ("*/resume/*/optimizer.safetensors", other_moments),
        ("*/resume/*/optimizer.safetensors", Path.unlink),
        ("*/resume/*/DONE", Path.unlink),
        ("*/events.jsonl", halve),
        ("*/steps/*/adapter_model.safetensors", halve),
    ],
    ids=named,
)
def test_what_a_killed_training_left_is_damaged(
    pattern: str, change: Callable[[Path], object], study: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"

    def disturbed() -> None:
        at_call(torch.optim.AdamW, "step", 4, killed)
        work_on(study, runs)

    assert in_child(disturbed, tmp_path / "said").code == -signal.SIGKILL
    spoil(runs, pattern, change)
    ended = in_child(lambda: work_on(study, runs), tmp_path / "said")
    assert ended.code == 0, ended.text
    is_sound(runs)
    assert results(runs) == undisturbed


@pytest.mark.deep
@pytest.mark.spread
@pytest.mark.parametrize(
    ("pattern", "change", "told"),
    [
        ("*lora*/records/training.json", halve, "is damaged"),
        ("*lora*/records/*/eval-micro-sort-*.json", halve, "is damaged"),
        ("*lora*/records/cost-inference.json", halve, "is damaged"),
        ("*lora*/run.json", halve, "is damaged"),
        ("*lora*/records/*/eval-micro-sort-*.json", lambda file: file.write_bytes(b"\xff" * 9), "not UTF-8"),
    ],
    ids=named,
)
def test_a_damaged_record_is_named_and_made_anew_when_moved(
    pattern: str,
    change: Callable[[Path], object],
    told: str,
    study: Path,
    undisturbed: dict[str, object],
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(study.parent / "runs", runs)
    file = spoil(runs, pattern, change)
    ended = in_child(lambda: work_on(study, runs), tmp_path / "said")
    assert ended.code == REFUSED and len(ended.text.splitlines()) == 1, ended.text
    assert told in ended.text and file.name in ended.text
    with pytest.raises(UserError, match=re.escape(file.name)):
        check_path(runs)
    file.rename(tmp_path / "moved")
    assert in_child(lambda: work_on(study, runs), tmp_path / "said").code == 0
    assert results(runs) == undisturbed


@pytest.mark.deep
@pytest.mark.spread
def test_a_scorer_that_ends_the_process_is_no_end_of_the_run(
    study: Path, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"

    def disturbed() -> None:
        own_exit(runs)
        work_on(study, runs)

    assert in_child(disturbed, tmp_path / "said").code == 0
    assert results(runs) != undisturbed, "it ended before it was done"
    resumes(study, runs, undisturbed)


def test_a_crash_of_our_own_would_be_seen(tmp_path: Path) -> None:
    ended = in_child(lambda: 1 / 0, tmp_path / "said")
    assert ended.code == CRASHED and "Traceback" in ended.text
