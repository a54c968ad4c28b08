"""A report is there whole or not at all, and no file is lost that no report wrote."""

import os
import signal
from pathlib import Path

import pytest

from peft_arena.report import whole
from peft_arena.report.whole import WRITTEN, written_whole


def write(out: Path, files: dict[str, str], **how: bool) -> None:
    with written_whole(out, **how) as part:
        for name, text in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text)


def found(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and path.name != WRITTEN
    }


@pytest.fixture(params=["swap", "no swap", "no exchange"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    if request.param == "no exchange":

        def refuse(one: Path, other: Path) -> None:
            raise OSError("not here")

        monkeypatch.setattr(whole, "_exchange", refuse)
    return {"swap": request.param != "no swap"}


def test_a_report_takes_the_place_of_the_one_before(how: dict[str, bool], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    write(out, {"index.html": "1", "figures/a.svg": "1", "tables/old.csv": "1"}, **how)
    assert found(out) == {"index.html": "1", "figures/a.svg": "1", "tables/old.csv": "1"}
    write(out, {"index.html": "2", "figures/b.svg": "2"}, **how)
    assert found(out) == {"index.html": "2", "figures/b.svg": "2"}
    assert [path.name for path in out.parent.iterdir()] == ["report"] and not list(out.rglob("*.part"))


def test_files_that_no_report_wrote_stay(how: dict[str, bool], tmp_path: Path) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    write(out, {"index.html": "1", "tables/a.csv": "1", "tables/b.csv": "1"}, **how)
    (out / "tables" / "mine.csv").write_text("mine")
    (out / "tables" / "a.csv").write_text("mended by hand")
    (out / "link").symlink_to("notes.txt")
    write(out, {"index.html": "2"}, **how)
    mine = {"notes.txt": "mine", "link": "mine", "tables/mine.csv": "mine", "tables/a.csv": "mended by hand"}
    assert found(out) == {"index.html": "2", **mine} and (out / "link").is_symlink()


def test_an_error_changes_nothing(how: dict[str, bool], tmp_path: Path) -> None:
    out = tmp_path / "report"
    write(out, {"index.html": "1"}, **how)
    with pytest.raises(KeyError), written_whole(out, **how) as part:
        (part / "index.html").write_text("half")
        raise KeyError
    assert found(out) == {"index.html": "1"} and [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("place", ["in the block", "before the exchange", "after the exchange"])
def test_killed_a_report_is_the_old_or_the_new(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write(out, {"index.html": "1", "old": "1"})
    (out / "mine").write_text("mine")
    child = os.fork()
    if child == 0:
        exchange = whole._exchange

        def killed(one: Path, other: Path) -> None:
            if place == "after the exchange":
                exchange(one, other)
            os.kill(os.getpid(), signal.SIGKILL)

        whole._exchange = killed
        try:
            with written_whole(out) as part:
                (part / "index.html").write_text("2")
                if place == "in the block":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    is_new = place == "after the exchange"
    assert found(out) == (
        {"index.html": "2", "mine": "mine"} if is_new else {"index.html": "1", "old": "1", "mine": "mine"}
    )
    write(out, {"index.html": "3"})
    assert found(out) == {"index.html": "3", "mine": "mine"} and [path.name for path in tmp_path.iterdir()] == [
        "report"
    ]


def test_a_report_where_the_process_works_keeps_its_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, {"index.html": "1", "old": "1"})
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    write(Path(), {"index.html": "2"})
    assert tmp_path.stat().st_ino == before and found(tmp_path) == {"index.html": "2"}
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_in_the_place_of_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(OSError, match="exists"):
        write(tmp_path / "report", {"index.html": "1"})
    assert (tmp_path / "report").read_text() == "mine"
