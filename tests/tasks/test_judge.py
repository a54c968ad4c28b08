"""The judge: the same verdicts as in the process itself, whatever a task does, and no longer than its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_arena.core.errors import UserError
from peft_arena.core.specs import RewardSpec, TaskSpec
from peft_arena.tasks import judge as judge_module
from peft_arena.tasks.base import Item, Part
from peft_arena.tasks.judge import Judge
from peft_arena.tasks.registry import make_task
from peft_arena.tasks.rewards import Answer, Judged, judge_answer, reward_of, reward_spec

EVIL = """
import os, signal, subprocess, sys, time
from peft_arena.tasks.base import Item, Part, Role, Score, Task
from peft_arena.tasks.registry import make_task

if os.environ.get("EVIL_IMPORT"):
    os._exit(7)

class Evil(Task):
    card = make_task("micro-sort").card.model_copy(update={"name": "evil"})

    def items(self, split):
        return [Item("q", "fine")]

    def prompt(self, item):
        return item.question

    def score(self, item, completion):
        word, _, rest = completion.partition(" ")
        if word == "print":
            print("noise " * 100000, flush=True)
            os.write(1, b'{"score": 1}\\n' * 10000)
            os.write(2, b"noise" * 100000)
            input_text = sys.stdin.read()
            return Score(1.0, extracted=input_text)
        if word == "exit":
            os._exit(3)
        if word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "memory":
            return Score(float(len(bytearray(16 * 2**30)) > 0))
        if word == "hang":
            child = subprocess.Popen(["sleep", "1000"])
            with open(rest, "w") as file:
                file.write(f"{os.getpid()} {child.pid}")
            while True:
                pass
        if word == "odd":
            return Score(0.5, weight=2, others={"more": Part(0.25, 3)})
        if word == "say":
            return Score(1.0, extracted=rest)
        if word == "modules":
            return Score(1.0, extracted=str("torch" in sys.modules))
        return Score(1.0, extracted=str(os.getpid()))
"""
SPEC = TaskSpec(name="evil", revision=make_task("micro-sort").card.revision, plugin="evil 1.0")
TASK = [RewardSpec()]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A plug-in whose task does what a completion tells it; found through the environment, as by any child."""
    folder = tmp_path_factory.mktemp("evil")
    info = folder / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peft_arena.tasks]\nevil = evil_code:Evil\n")
    (folder / "evil_code.py").write_text(EVIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def judge(evil: None) -> Iterator[Judge]:
    with Judge(SPEC, TASK, seconds=20) as made:
        yield made


def answer(completion: str) -> Answer:
    return Answer(Item("q", "fine", data={"answer": "x"}), completion, 3, True)


def ask(judge: Judge, completion: str) -> Judged:
    return judge.judge([answer(completion)])[0]


def gone(pid: int) -> bool:
    """Whether a process ends within five seconds; a zombie has ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_the_same_verdicts_as_in_the_process_itself() -> None:
    task = make_task("micro-sort")
    spec = TaskSpec(name="micro-sort", revision=task.card.revision, config=task.config.model_dump(mode="json"))
    specs = [
        reward_spec("task"),
        reward_spec("format", 0.5, {"pattern": "[a-z ]*"}),
        reward_spec("length", 1.0, {"buffer": 2}),
        reward_spec("ended"),
    ]
    items = task.items("test")[:20]
    answers = [
        Answer(item, [task.target(item), "no", "", " b a"][place % 4], place, place % 3 > 0, limit=9)
        for place, item in enumerate(items)
    ]
    expected = [judge_answer(task, [reward_of(reward) for reward in specs], each) for each in answers]
    with Judge(spec, specs) as judge:
        assert judge.judge(answers) == expected
        assert judge.judge([]) == []
    assert len({judged.rewards["task"] for judged in expected}) == 2


def test_every_field_of_a_score_survives(judge: Judge) -> None:
    score = ask(judge, "odd").score
    assert (score.value, score.weight, score.others) == (0.5, 2, {"more": Part(0.25, 3)})


@pytest.mark.parametrize("text", ["\ud800 \udfff\ud800", "\x00\x1b\r\n\u2028\x85", "é\U0001f4a9" * 300_000])
def test_any_text_survives(judge: Judge, text: str) -> None:
    assert ask(judge, f"say {text}").score.extracted == text


def test_what_a_task_prints_and_asks_for_goes_nowhere(judge: Judge) -> None:
    judged = ask(judge, "print")
    assert (judged.score.value, judged.score.extracted, judged.rewards) == (1.0, "", {"task": 1.0})


def test_the_child_has_no_torch(judge: Judge) -> None:
    assert ask(judge, "modules").score.extracted == "False"


def test_memory_is_limited(judge: Judge) -> None:
    before = ask(judge, "pid").score.extracted
    assert "raised MemoryError" in ask(judge, "memory").score.reason
    assert ask(judge, "pid").score.extracted == before


@pytest.mark.parametrize(("word", "how"), [("exit", "exit code 3"), ("crash", "signal SIGSEGV")])
def test_a_child_that_dies_is_replaced(judge: Judge, word: str, how: str) -> None:
    died, alive = judge.judge([answer(word), answer("pid")])
    assert died.score.value is None and died.score.reason == f"scoring an answer to evil ended its process ({how})"
    assert died.rewards == {"task": 0.0}
    assert alive.rewards == {"task": 1.0}


def test_an_answer_that_takes_too_long_is_killed_with_all_it_started(evil: None, tmp_path: Path) -> None:
    with Judge(SPEC, TASK, seconds=1) as judge:
        ask(judge, "pid")
        began = time.monotonic()
        late, alive = judge.judge([answer(f"hang {tmp_path / 'pids'}"), answer("pid")])
        assert 1 <= time.monotonic() - began < 30
        assert late.score.reason == "scoring an answer to evil took longer than 1 s" and late.rewards == {"task": 0.0}
        assert alive.score.value == 1.0
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(gone(pid) for pid in [*pids, int(alive.score.extracted)])


def test_an_endless_regular_expression_is_killed(evil: None) -> None:
    with Judge(SPEC, [*TASK, reward_spec("format", 1.0, {"pattern": "(a|a)*b"})], seconds=1) as judge:
        late, alive = judge.judge([answer("a" * 60), answer("aab")])
    assert "took longer than 1 s" in late.score.reason and late.rewards == {"task": 0.0, "format": 0.0}
    assert alive.rewards == {"task": 1.0, "format": 1.0}


def test_an_interrupted_exchange_is_not_continued(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(judge, "pid")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(judge_module._Child, "_read", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        ask(judge, "say first")
    assert ask(judge, "say second").score.extracted == "second"


def test_threads_take_turns(judge: Judge) -> None:
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = [judged.score.extracted for judged in judge.judge([answer(f"say {number}")] * 50)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {number: [str(number)] * 50 for number in range(4)}


def test_what_cannot_be_made_is_told_at_the_start(evil: None, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = make_task("piqa").card
    for spec, rewards, told in (
        (SPEC.model_copy(update={"version": 2}), TASK, "planned with 2"),
        (SPEC.model_copy(update={"plugin": "evil 0.9"}), TASK, "planned with evil 0.9"),
        (SPEC, [RewardSpec(name="nothing")], "unknown reward 'nothing'"),
        (TaskSpec(name="piqa", revision=choice.revision, version=choice.version), TASK, "kind choice"),
    ):
        with pytest.raises(UserError, match=told), Judge(spec, rewards):
            pass
    monkeypatch.setenv("EVIL_IMPORT", "1")
    with pytest.raises(UserError, match=r"did not start 3 times in a row: it ended its process \(exit code 7\)"):
        Judge(SPEC, TASK).judge([answer("pid")])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Judge(SPEC, TASK, seconds=0)
    with pytest.raises(ValueError, match="named twice"):
        Judge(SPEC, TASK * 2)


@pytest.mark.slow
def test_the_child_ends_with_its_parent(evil: None, tmp_path: Path) -> None:
    code = (
        "import os; from tests.tasks.test_judge import *; judge = Judge(SPEC, TASK);"
        "print(ask(judge, 'pid').score.extracted, flush=True); os._exit(0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert gone(int(done.stdout))


@pytest.mark.slow
def test_a_child_whose_parent_was_killed_ends_in_the_middle_of_a_score(evil: None, tmp_path: Path) -> None:
    code = (
        "from tests.tasks.test_judge import *; judge = Judge(SPEC, TASK, seconds=0.3);"
        "ask(judge, 'pid'); judge.seconds = 1000; "
        f"ask(judge, 'hang {tmp_path / 'pids'}')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child, grandchild = (int(pid) for pid in (tmp_path / "pids").read_text().split())
    try:
        assert gone(child), "the limit is 0.3 s: its own end comes 2.6 s after the beginning"
    finally:
        os.killpg(os.getpgid(grandchild), signal.SIGKILL)  # the child's group
