"""Where a benchmark's rows are from: the hub at a commit, a file of the user's, the miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import TaskSpec
from peft_arena.tasks.base import ACCURACY, Item, Kind, Role, TaskCard
from peft_arena.tasks.benchmarks import base
from peft_arena.tasks.benchmarks.base import Benchmark, BenchmarkConfig, HubSplit
from peft_arena.tasks.registry import check_version, make_task
from peft_arena.tasks.splits import Keyed

PINNED, NEWEST = "a" * 40, "b" * 40


class Toy(Benchmark):
    """Two subjects; the first is pinned."""

    parts = ("x", "y")
    data = {  # noqa: RUF012
        "train": (HubSplit("owner/toy", "train", "x", PINNED),),
        "test": (HubSplit("owner/toy", "test", "x", PINNED), HubSplit("owner/other", "test", "y")),
    }
    card = TaskCard(
        name="toy", title="Toy", version=1, role=Role.TARGET, kind=Kind.GENERATE, metrics=(ACCURACY,), chance=None,
        source="hub", revision="?", licence="none", citation="none", description="Protocol: none. Differs: none.",
    )  # fmt: skip

    def read(self, row: Any, where: HubSplit) -> Keyed | None:
        """Read a row."""
        return Keyed(row["q"], Item(row["q"], answer=row["a"], data={"part": where.subset}))

    def prompt(self, item: Item) -> str:
        """Return the question."""
        return item.question

    def stratum(self, item: Item) -> str:
        """Return the subject."""
        return str(item.data["part"])


def rows(part: str, split: str, count: int) -> list[dict[str, str]]:
    return [{"q": f"{part} {split} {number}?", "a": str(number)} for number in range(count)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    asked: list[tuple[object, ...]] = []

    def read(name: str, subset: str | None, split: str, revision: str, **_: object) -> list[dict[str, str]]:
        asked.append((name, subset, split, revision))
        return rows(str(subset), split, {"train": 30, "test": 6 if subset == "x" else 3}[split])

    monkeypatch.setattr(base, "read_hub", read)
    monkeypatch.setattr(base, "_newest", lambda name: NEWEST)
    return asked


def test_data_without_a_commit_is_looked_up_and_recorded(hub: list[tuple[object, ...]]) -> None:
    task = Toy()
    planned = f"owner/toy@{PINNED}, owner/other@main"
    assert task.card.revision == task.card_as_loaded().revision == planned
    task.items("test")
    assert hub == [("owner/toy", "x", "test", PINNED), ("owner/other", "y", "test", NEWEST)]
    assert task.card.revision == planned, "a study goes on with the task it was planned with"
    assert task.card_as_loaded().revision == f"owner/toy@{PINNED}, owner/other@{NEWEST}"
    check_version(task, TaskSpec(name="toy", version=task.card.version, revision=planned))


def test_a_commit_of_the_users_own_is_read_and_part_of_the_identity(hub: list[tuple[object, ...]]) -> None:
    task = Toy(BenchmarkConfig(revision="c" * 40))
    task.items("test")
    assert {revision for *_, revision in hub} == {task.card.revision} == {"c" * 40}


def test_test_items_take_the_parts_in_turn_and_validation_is_cut_from_train(hub: list[tuple[object, ...]]) -> None:
    task = Toy()
    assert [item.data["part"] for item in task.items("test")] == ["x", "y", "x", "y", "x", "y", "x", "x", "x"]
    assert [item.id for item in task.items("test")] == [item.id for item in Toy().items("test")]
    found = {split: {item.question for item in task.items(split)} for split in ("train", "validation", "test")}
    assert [len(found[split]) for split in found] == [27, 3, 9]
    assert not found["train"] & found["validation"]


def test_files_of_the_users_own_stand_for_the_hub(tmp_path: Path) -> None:
    for part, split, count in (("x", "train", 20), ("x", "test", 3), ("y", "test", 2)):
        (tmp_path / part).mkdir(exist_ok=True)
        text = "\n".join(map(json.dumps, rows(part, split, count)))
        (tmp_path / part / f"{split}.jsonl").write_text(text)
    task = Toy(BenchmarkConfig(source="file", path=str(tmp_path)))
    assert len(task.items("test")) == 5
    assert task.card.source == f"files of {tmp_path} in the place of hub"
    before = task.card.revision
    assert before.startswith("sha256:")
    (tmp_path / "y" / "test.jsonl").write_text(json.dumps({"q": "new", "other": "1"}))
    changed = Toy(BenchmarkConfig(source="file", path=str(tmp_path)))
    assert changed.card.revision != before
    with pytest.raises(UserError, match="owner/other .y, test. has no column 'a'.*it has other, q"):
        changed.items("test")
    (tmp_path / "y" / "test.jsonl").unlink()
    with pytest.raises(UserError, match="task toy: no file .*y/test.jsonl or .parquet"):
        Toy(BenchmarkConfig(source="file", path=str(tmp_path))).items("test")
    with pytest.raises(UserError, match="task toy has several splits: path must be a folder with x/train, x/test"):
        Toy(BenchmarkConfig(source="file", path=str(tmp_path / "x" / "test.jsonl"))).items("train")
    with pytest.raises(UserError, match="is no file and holds none"):
        Toy(BenchmarkConfig(source="file", path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"source": "file"}, "'path' belongs to source 'file'"),
        ({"path": "x"}, "'path' belongs to source 'file'"),
        ({"revision": "main"}, "commit of 40 hex digits"),
        ({"source": "miniature", "revision": PINNED}, "commit of 40 hex digits"),
        ({"sourse": "hub"}, "unknown key 'sourse'.*source"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_task("arena-math500", config)


def test_a_split_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="unknown split 'train'"):
        make_task("arena-math500", {"source": "miniature"}).items("train")
