"""What the demo's tests work with."""

from pathlib import Path

import pytest

from moelora.demo.job import Clock, run_demo
from moelora.demo.options import DemoOptions
from moelora.demo.results import DemoResults
from moelora.demo.skills import read_skills
from tests.demo.tiny import save_tiny_model, save_toy_skills


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def toy_skills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_skills(tmp_path_factory.mktemp("skills"))


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, toy_skills: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DemoResults]:
    """A complete demo: the folder it wrote and what it returned."""
    out = tmp_path_factory.mktemp("runs") / "out"
    options = DemoOptions(
        out=out, model=str(tiny_model), data=toy_skills, steps=12, rank=4, compare_total_rank=True
    )
    results = run_demo(options, read_skills(toy_skills), clock=Clock(), show_progress=False)
    return out, results
