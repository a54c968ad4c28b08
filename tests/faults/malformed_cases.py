"""Malformed inputs: for each entry point of the command line, each kind of what can be wrong with what it reads."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.faults.malformed_kinds import (
    BYTES,
    COST,
    DATA,
    EVALUATION,
    JSON,
    PLACES,
    RUN,
    STUDY,
    TEMPLATES,
    TRAINING,
    VALUES,
    YAML,
    Break,
    replaced,
)
from tests.faults.malformed_world import CODES, World

Prepare = Callable[[World, Path], list[str]]


class Case(NamedTuple):
    """One malformed input of one entry point."""

    entry: str
    kind: str
    prepare: Prepare
    """Makes the input in an empty directory; returns the arguments of the command."""
    codes: tuple[int, ...] = CODES
    """Exit codes that are right."""
    says: str = ""
    """What the output must hold."""


def some(kinds: Mapping[str, Break], *names: str) -> dict[str, Break]:
    """Return kinds by name."""
    return {name: kinds[name] for name in names}


FILE = {**PLACES, **BYTES, **JSON}
FEW = some(FILE, "directory", "pipe", "device", "loop", "empty", "half", "no text", "list", "deep", "twice", "padding")


def _record(run: Path, name: str) -> Path:
    """Return the file of a record of a run: its own, its training's, a cost's, or its first evaluation."""
    if name == "run":
        return run / "run.json"
    if name == "evaluation":
        return sorted(run.glob("records/*/eval-*.json"))[0]
    return run / "records" / f"{name}.json"


def _broken_run(name: str, breaks: Break, command: Callable[[str, Path], list[str]]) -> Prepare:
    def prepare(world: World, place: Path) -> list[str]:
        run = world.copy(place, "kept") / "kept" / world.lora
        breaks(_record(run, name))
        return command(world.lora, place)

    return prepare


RECORDS = {
    "evaluation": {**EVALUATION, **PLACES, **BYTES, **JSON},
    "training": {**TRAINING, **some(FILE, "directory", "half", "deep")},
    "cost-training": COST,
    "run": {**RUN, **some(FILE, "pipe", "empty", "list")},
}


def _of_records() -> Iterator[Case]:
    def check(run: str, place: Path) -> list[str]:
        return ["check", f"kept/{run}"]

    def status(run: str, place: Path) -> list[str]:
        return ["status", "demo", "--runs", "kept"]

    def report(run: str, place: Path) -> list[str]:
        return ["report", "demo", "--runs", "kept", "--out", "report"]

    for name, kinds in RECORDS.items():
        for kind, breaks in kinds.items():
            yield Case("check", kind, _broken_run(name, breaks, check), says="damaged")
    shared = {
        "evaluation": some(
            RECORDS["evaluation"], "other run", "no metrics", "NaN item", "negative step", "infinite weight",
            "directory",
            "pipe", "deep", "half", "twice", "card of lists", "engine of lists", "another mean", "huge step",
        ),
        "training": some(RECORDS["training"], "negative steps", "huge steps", "save points backwards", "directory"),
        "run": some(RECORDS["run"], "another seed", "no date", "pipe"),
    }  # fmt: skip
    for name, kinds in shared.items():
        for kind, breaks in kinds.items():
            yield Case("status", kind, _broken_run(name, breaks, status), codes=(1,), says="failed")
    slow = {
        "evaluation": some(RECORDS["evaluation"], "other run", "no metrics", "NaN item", "negative step",
            "pipe", "deep", "card of lists"),
        "training": some(RECORDS["training"], "negative steps", "huge steps"),
        "cost-training": some(COST, "seconds below 0"),
        "run": some(RECORDS["run"], "no date"),
    }  # fmt: skip
    for name, kinds in slow.items():
        for kind, breaks in kinds.items():
            yield Case("report", kind, _broken_run(name, breaks, report), codes=(0,), says="report:")
    for kind in ("negative step", "other run", "pipe", "deep", "half", "no metrics", "infinite item", "padding"):
        yield Case(
            "show",
            kind,
            _broken_run("evaluation", RECORDS["evaluation"][kind], lambda run, place: ["show", run, "--runs", "kept"]),
        )
    for kind in ("empty", "list", "pipe", "no spec"):
        yield Case(
            "show", kind, _broken_run("run", RECORDS["run"][kind], lambda run, place: ["show", run, "--runs", "kept"])
        )
    for kind in ("negative steps", "huge steps", "directory", "half", "deep", "loss is NaN", "training of another"):
        command = ["--runs", "kept", "--out", "out.json"]
        yield Case(
            "export-hf",
            kind,
            _broken_run("training", RECORDS["training"][kind], lambda run, place, c=command: ["export-hf", run, *c]),
        )
    for kind in ("other run", "no metrics", "NaN item", "pipe", "text for a number"):
        yield Case(
            "export-hf",
            kind,
            _broken_run(
                "evaluation", RECORDS["evaluation"][kind], lambda run, place, c=command: ["export-hf", run, *c]
            ),
        )


def _written(name: str, text: str, *command: str) -> Prepare:
    def prepare(world: World, place: Path) -> list[str]:
        (place / name).write_text(text)
        return list(command)

    return prepare


def _broken_file(name: str, breaks: Break, *command: str, copied: str = "") -> Prepare:
    def prepare(world: World, place: Path) -> list[str]:
        world.copy(place, copied or name)
        breaks(place / name)
        return [part.replace("MADE", world.made) for part in command]

    return prepare


def _of_studies() -> Iterator[Case]:
    for kind, text in YAML.items():
        yield Case("plan", kind, _written("s.yaml", text, "plan", "s.yaml"))
    for kind, breaks in {**PLACES, **BYTES}.items():
        yield Case("plan", kind, _broken_file("study.yaml", breaks, "plan", "study.yaml"))
    for kind in (
        "aliases",
        "deep YAML",
        "tag of Python",
        "octal",
        "half a character",
        "long",
        "key twice",
        "list on top",
    ):
        yield Case("run", kind, _written("s.yaml", YAML[kind], "run", "s.yaml", "--runs", "runs"))
    places = [
        "targets.0.items",
        "train.learning_rate",
        "train.schedule.steps",
        "seeds",
        "arms.0.config.rank",
        "train.batch_size",
    ]
    for number, (kind, value) in enumerate(VALUES.items()):
        spot = places[number % len(places)]
        if (kind, spot) not in {("negative", "seeds")}:
            yield Case(
                "run", kind, _written("s.yaml", STUDY, "run", "s.yaml", "--runs", "runs", "--set", f"{spot}={value}")
            )
    train = ["train", "sft", "--method", "lora", "--task", "micro-reverse", "--out", "runs"]
    spots = [
        "train.learning_rate",
        "train.schedule.steps",
        "config.rank",
        "train.save_points",
        "seed",
        "train.max_length",
    ]
    for number, (kind, value) in enumerate(VALUES.items()):
        spot = spots[number % len(spots)]
        given = ["--set", "train.schedule.steps=1", "--set", "train.learning_rate=1e-3", "--set", f"{spot}={value}"]
        yield Case("train", kind, _written("x", "", *train, "--model", "micro", *given))
    for kind, name in {"long name": "x" * 5000, "null character": "~nobody-here/x", "memory": "/proc/self/mem"}.items():
        yield Case("train", kind, _written("x", "", *train, "--model", name, "--set", "train.schedule.steps=1"))
        yield Case("eval", kind, _written("x", "", "eval", name + "/y", "--tasks", "micro-facts", "--runs", "runs"))
    for kind, value in {
        "NaN": "{train: .nan, validation: 0.1, test: 0.1}",
        "infinity": "{train: .inf}",
        "word": "all",
        "list for one": "[1, 2]",
    }.items():
        config = f"{{path: rows.jsonl, prompt: question, answer: answer, splits: {value}}}"
        own = f"targets: [{{task: custom, config: {config}}}]"
        text = STUDY.replace("targets: [{task: micro-reverse}]", own)
        yield Case(
            "data",
            f"splits {kind}",
            _broken_file(
                "rows.jsonl", lambda path, t=text: (path.parent / "s.yaml").write_text(t) and None, "plan", "s.yaml"
            ),
        )


def _of_data() -> Iterator[Case]:
    for kind, breaks in {**PLACES, **BYTES}.items():
        yield Case(
            "data",
            kind,
            _broken_file("rows.jsonl", breaks, "data", "rows.jsonl"),
            codes=(0,) if kind == "half" else CODES,
        )
    for kind, content in DATA.items():
        train = ["train", "sft", "--model", "micro", "--method", "lora", "--task", "rows.jsonl", "--out", "runs"]
        steps = ["--set", "train.schedule.steps=1", "--set", "train.learning_rate=1e-3"]
        yield Case("train", kind, _broken_file("rows.jsonl", lambda path, c=content: replaced(path, c), *train, *steps))
    for kind in ("empty", "half", "binary", "nulls", "zipped", "list"):

        def parquet(path: Path, kind: str = kind) -> None:
            FILE[kind](path)
            path.rename(path.with_suffix(".parquet"))

        yield Case("data", f"{kind} parquet", _broken_file("rows.jsonl", parquet, "data", "rows.parquet"))

    def framed(path: Path) -> None:
        replaced(path.with_suffix(".parquet"), b"PAR1" + b"\xff" * 500 + b"\x10\x00\x00\x00PAR1")

    yield Case("data", "framed parquet", _broken_file("rows.jsonl", framed, "data", "rows.parquet"))
    for kind, breaks in {**PLACES, **some(BYTES, "empty", "no text", "two bytes a letter")}.items():
        command = ["geometry", "drift", "--tuned", "adapter", "--base", "micro", "--out", "out"]
        sets = ["--general", "prompts.txt", "--target", "prompts.txt"]

        def prepare(
            world: World, place: Path, breaks: Break = breaks, command: list[str] = command, sets: list[str] = sets
        ) -> list[str]:
            world.copy(place, "adapter", "prompts.txt")
            breaks(place / "prompts.txt")
            return [*command, *sets]

        yield Case("geometry", kind, prepare)
    for kind, breaks in {**FEW, **some(JSON, "text", "null", "huger number")}.items():
        yield Case(
            "import hf-results", kind, _broken_file("result.json", breaks, "import", "hf-results", "result.json")
        )

        def experiments(world: World, place: Path, breaks: Break = breaks) -> list[str]:
            world.copy(place, "experiments", "default_training_params.json")
            breaks(place / "experiments" / "lora" / "a" / "adapter_config.json")
            return ["import", "hf-experiment", "experiments", "--out", "s.yaml"]

        yield Case("import hf-experiment", kind, experiments)


def _of_models() -> Iterator[Case]:
    evaluate = ["eval", "./model", "--tasks", "micro-facts", "--items", "2", "--runs", "runs"]
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    for number, (kind, breaks) in enumerate({**FEW, **some(FILE, "text", "null", "huger number", "memory")}.items()):
        name = names[number % len(names)]
        yield Case("eval", kind, _broken_file(f"model/{name}", breaks, *evaluate, copied="model"))
        other = names[(number + 1) % len(names)]
        cost = ["cost", "./model", "--runs", "runs", "--prompt-lengths", "4", "--new-tokens", "2", "--repeats", "2"]
        yield Case("cost", kind, _broken_file(f"model/{other}", breaks, *cost, copied="model"))
    for kind, template in TEMPLATES.items():
        text = template.encode()
        yield Case(
            "eval",
            f"template: {kind}",
            _broken_file(
                "model/chat_template.jinja", lambda path, t=text: replaced(path, t), *evaluate, copied="model"
            ),
        )

    def pattern(path: Path) -> None:
        text = path.read_text().replace(
            '"pre_tokenizer": null',
            '"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "'
            + "(a" * 100_000
            + ")" * 100_000
            + '"}, "behavior": "Isolated", "invert": false}',
        )
        table = text if "Regex" in text else '{"model": {"Regex": "' + "(a" * 100_000 + '"}}'
        replaced(path, table.encode())

    yield Case("eval", "huge pattern", _broken_file("model/tokenizer.json", pattern, *evaluate, copied="model"))
    for kind, breaks in {**FEW, **some(FILE, "text", "null", "memory", "endless")}.items():
        given = ["--base", "micro", "--out", "out"]
        for entry in ("merge", "export"):
            command = [entry, "./adapter", *given, *(["--to", "lora", "--rank", "2"] if entry == "export" else [])]
            name = "adapter_config.json" if entry == "merge" or kind in JSON else "adapter_model.safetensors"
            if (entry, kind) != ("export", "twice"):
                yield Case(entry, kind, _broken_file(f"adapter/{name}", breaks, *command, copied="adapter"))
    for kind, breaks in some(FILE, "pipe", "empty", "half", "deep", "directory", "list").items():
        command = ["path", "scan", "MADE", "--runs", "made", "--items", "2"]

        def broken(world: World, place: Path, breaks: Break = breaks, command: list[str] = command) -> list[str]:
            world.copy(place, "made")
            breaks(place / "made" / world.made / "records" / "training.json")
            return [part.replace("MADE", world.made) for part in command]

        yield Case("path", kind, broken)
    for kind, grid in {
        "NaN": "nan",
        "infinity": "0:inf:0.1",
        "word": "all",
        "negative": "-1:1:0.1",
        "10^400": "9" * 400,
        "long word": "0:1:1e-9",
    }.items():
        yield Case(
            "path",
            kind,
            _broken_file("made", lambda path: None, "path", "scan", "MADE", "--runs", "made", f"--grid={grid}"),
        )
    for kind, factor in {"NaN": "nan", "infinity": "inf", "beyond floats": "1e999", "word": "all"}.items():
        yield Case(
            "merge",
            kind,
            _broken_file(
                "adapter",
                lambda path: None,
                "merge",
                "./adapter",
                "--base",
                "micro",
                "--out",
                "o",
                f"--factor={factor}",
            ),
        )


CASES = [*_of_records(), *_of_studies(), *_of_data(), *_of_models()]
