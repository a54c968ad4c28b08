"""The user's own data through the whole path: named tasks, and data that changes under a study."""

import json

from .conftest import TINY, arena

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
