"""What the command line's tests work with."""

from pathlib import Path

import pytest

from tests.demo.tiny import save_tiny_model, save_toy_skills


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def toy_skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_skills(tmp_path_factory.mktemp("skills"))
