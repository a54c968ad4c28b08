"""One tiny model for all training tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from .toy import build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny random model."""
    directory = tmp_path_factory.mktemp("toy") / "model"
    build_model(directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bit-identity is promised at one thread count."""
    import torch

    torch.set_num_threads(1)
