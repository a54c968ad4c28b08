"""The user's own data through the whole path: named tasks, and data that changes under a study."""

import json
import re
from pathlib import Path

from tests.running import TINY, arena

README = Path(__file__).parents[2] / "README.md"

OWN = """\
  - task: custom
    items: 4
    config:
      name: tickets
      path: {path}
      columns: {{prompt: question, response: reply}}
      scorer: exact_match
      splits: {{train: 0.6, validation: 0.2, test: 0.2}}
"""


def study(tmp_path, rows):
    data = tmp_path / "tickets.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TINY.replace("  - {task: micro-reverse, items: 12}\n", OWN.format(path=data))
    (tmp_path / "own.yaml").write_text(text.replace("  - {method: full}\n", ""))
    return tmp_path / "own.yaml"


def rows(answer):
    return [{"question": f"Ticket {number}: what now?", "reply": f"{answer} {number % 3}"} for number in range(60)]


def test_own_data_has_its_name_and_changed_data_is_another_run(tmp_path):
    file = study(tmp_path, rows("wait"))
    first = arena("run", file, "--runs", tmp_path / "runs", "--report", tmp_path / "report", "--json")
    assert first.returncode == 0, first.stdout + first.stderr
    said = json.loads(first.stdout)
    assert set(said["runs"].values()) == {"done"}
    assert "tickets" in (tmp_path / "report" / "index.html").read_text()
    study(tmp_path, rows("call"))
    again = json.loads(arena("plan", file, "--runs", tmp_path / "runs", "--json").stdout)
    states = {run["arm"]: run["state"] for run in again["runs"]}
    assert states == {"base": "missing", "lora": "missing"}, "other data is another run and another evaluation"


def test_the_readmes_own_example_runs_with_a_file_of_400_rows(tmp_path):
    """On the packaged model, two steps and one arm; everything else is as it stands there."""
    text = next(
        block for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL) if "tickets" in block
    )
    study, data = tmp_path / "tickets.yaml", tmp_path / "tickets.jsonl"
    study.write_text(text)
    data.write_text(
        "".join(
            json.dumps({"question": f"Ticket {number}?", "reply": f"Answer {number}"}) + "\n" for number in range(400)
        )
    )
    small = [
        "model={name: micro}",
        "retention=[{task: micro-sort, items: 8}]",
        "seeds=[0]",
        f"targets.0.config.path={data}",
    ]
    small += [
        "train.schedule={steps: 2}",
        "arms=[{method: lora, train: {learning_rate: 1e-3}}]",
        "execution={threads: 1}",
    ]
    given = [part for setting in small for part in ("--set", setting)]
    planned = arena("plan", study, "--runs", tmp_path / "runs", *given)
    assert planned.returncode == 0, planned.stderr
    assert "the held-out loss is over 40 validation items, all there are, not 64" in planned.stdout
    assert "from all 320 items of its split" in planned.stdout and "few items for the margin" in planned.stdout
    done = arena("run", study, "--runs", tmp_path / "runs", "--json", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert set(said["runs"].values()) == {"done"} and any("40 validation items" in note for note in said["notes"])
    run_id = next(name for name in said["runs"] if "lora" in name)
    training = json.loads((tmp_path / "runs" / run_id / "records" / "training.json").read_text())
    assert training["validation_items"] == 40
    again = arena("plan", study, "--runs", tmp_path / "runs", "--json", *given)
    assert {run["state"] for run in json.loads(again.stdout)["runs"]} == {"done"}


def test_what_a_run_refuses_a_plan_refuses_in_the_same_line(tmp_path):
    file = study(tmp_path, rows("wait"))
    for setting in ("targets.0.items=500", "train.validation_items=64", "train.max_length=8", "arms=[{method: none}]"):
        lines = [arena(what, file, "--runs", tmp_path / "runs", "--set", setting) for what in ("plan", "run")]
        assert [one.returncode for one in lines] == [2, 2], setting
        assert lines[0].stderr == lines[1].stderr and lines[0].stderr.count("\n") == 1
