"""A model directory as a GGUF file, by llama.cpp's own converter, if it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peft_arena.core.bounded import user_path
from peft_arena.core.errors import UserError
from peft_arena.export.export_record import Exported, write_record
from peft_arena.methods.files import SETTINGS
from peft_arena.weights.files import model_files

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MAGIC = b"GGUF"


def converter(environment: Mapping[str, str] | None = None) -> Path:
    """Return llama.cpp's converter: in the directory that ``LLAMA_CPP`` names, or on the path.

    Raises:
        UserError: it is in neither.
    """
    named = (os.environ if environment is None else environment).get(VARIABLE)
    if named:
        file = user_path(named) / CONVERTER
        if not file.is_file():
            raise UserError(f"{VARIABLE} names {named}, which has no {CONVERTER}")
        return file
    found = shutil.which(CONVERTER)
    if found is None:
        raise UserError(
            f"--to gguf needs llama.cpp's {CONVERTER}, which is not installed: put it on the path, or let {VARIABLE} "
            "name the directory of llama.cpp"
        )
    return Path(found)


def to_gguf(checkpoint: str, out: Path, dtype: str | None) -> Exported:
    """Convert a model directory.

    Raises:
        UserError: it is not a model directory, the converter is not there or fails, or the disk refuses.
    """
    from peft_arena.weights.writing import new_directory

    directory = user_path(checkpoint)
    if not (directory / "config.json").is_file() or (directory / SETTINGS).exists():
        raise UserError(f"{checkpoint} is not a model directory: write one first with peft-arena merge {checkpoint}")
    if dtype is not None and dtype not in TYPES:
        raise UserError(f"cannot write a GGUF file as '{dtype}'. Known: {', '.join(TYPES)}")
    tool = converter()
    size = sum(file.stat().st_size for file in model_files(directory).files)
    name = f"{directory.resolve().name}.gguf"
    with new_directory(out, size) as part:
        command = [sys.executable, str(tool), str(directory.resolve()), "--outfile", str(part / name)]
        command += [] if dtype is None else ["--outtype", TYPES[dtype]]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise UserError(f"{tool} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
        if not (part / name).is_file() or (part / name).open("rb").read(4) != MAGIC:
            raise UserError(f"{tool} ended well and left no GGUF file")
        exported = Exported(str(out), "gguf", "safetensors", (name,), None, dtype)
        write_record(part, exported, source=directory, converter=str(tool))
    return exported
