"""Rules about the project as a whole: its boundary, its public names, its files."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moelora

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moelora"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 600

# The public names. Adding one is a decision, removing or renaming one is a breaking change; both
# belong in CHANGELOG.md.
PUBLIC_NAMES = [
    "AuxLossError",
    "CheckpointError",
    "ComposedExpert",
    "Composition",
    "ConfigError",
    "DescribedExpert",
    "DescribedRouter",
    "Description",
    "ExpertLoad",
    "ExpertManager",
    "ExpertRecord",
    "ExportedExpert",
    "IncompatiblePeftError",
    "MergeError",
    "MergedExperts",
    "MoELoraConfig",
    "MoELoraError",
    "MoEOptimizer",
    "MoETrainerCallback",
    "Novelty",
    "NoveltyDetector",
    "Preparation",
    "ReportError",
    "RoutedDistance",
    "Router",
    "Routing",
    "RoutingRecord",
    "RoutingReport",
    "RoutingWeightsError",
    "SkillError",
    "SkillLibrary",
    "TwoPhaseSchedule",
    "UnsupportedLayerError",
    "compose",
    "describe",
    "export_expert",
    "freeze_experts",
    "install",
    "is_installed",
    "load_balancing_loss",
    "mark_mature",
    "merge_experts",
    "param_groups",
    "pool_hidden_states",
    "prepare_for_inference",
    "record_routing",
    "router_entropy",
    "router_z_loss",
    "routing_report",
    "skill_embeddings",
    "switch_loss",
    "top_k_routing",
    "uninstall",
    "update_optimizer",
]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _assigned_attributes(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs (first name, line) of assignments such as ``transformers.Trainer.train = ...``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            root: ast.expr = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name):
                yield root.id, f"{_name(path)}:{node.lineno}"


def _project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, object] = tomllib.load(file)["project"]
    return project


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_the_boundary_imports_peft(path: Path) -> None:
    imported = {name.split(".")[0] for name in _imports(path)}
    assert path.name == "_peft.py" or "peft" not in imported, (
        f"{_name(path)} must take PEFT's names from moelora._peft"
    )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_the_boundary_assigns_to_other_libraries(path: Path) -> None:
    foreign = [
        place
        for owner, place in _assigned_attributes(path)
        if owner in {"torch", "peft", "transformers", "accelerate", "nn", "F"}
    ]
    assert path.name == "_peft.py" or not foreign


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=_name)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_the_public_names_are_the_listed_ones() -> None:
    assert sorted(moelora.__all__) == sorted(PUBLIC_NAMES)


def test_every_public_name_exists_once() -> None:
    assert len(set(moelora.__all__)) == len(moelora.__all__)
    assert [name for name in moelora.__all__ if not hasattr(moelora, name)] == []


@pytest.mark.parametrize("name", moelora.__all__)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(moelora, name)
    if not (inspect.isclass(value) or callable(value)):
        return
    # a class without a docstring inherits none here, unlike with inspect.getdoc.
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc
    assert doc.strip()
    # what dataclass writes where no docstring is.
    assert not doc.startswith(f"{name}(")


def test_every_bounded_dependency_gives_its_reason_in_a_comment() -> None:
    """A requirement's comment stands right above it."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    requirement = re.compile(r'^    "[A-Za-z][A-Za-z0-9_.\[\]-]*[<>=!~]')
    found = [number for number, line in enumerate(lines) if requirement.match(line)]
    unexplained = [
        lines[number].strip() for number in found if not lines[number - 1].startswith("    # ")
    ]
    assert len(found) >= len(_requirements())
    assert unexplained == []


def test_every_dependency_is_bounded() -> None:
    assert [text for text in _requirements() if not re.search(r"[<>=~]=?\d", text)] == []


def _requirements() -> list[str]:
    project = _project()
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    runtime = project["dependencies"]
    assert isinstance(runtime, list)
    return [*runtime, *(text for extra in extras.values() for text in extra)]


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {
        re.split(r"==", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    named = {re.split(r"[\[<>=!~;]", text)[0].strip().lower() for text in _requirements()}
    # only Python 3.10 takes it, and no test depends on its version.
    assert named - pinned == {"tomli"}


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_the_same_everywhere() -> None:
    version = _project()["version"]
    assert importlib.metadata.version("moelora") == version
    assert moelora.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'version: "{version}"' in citation.splitlines()


def test_the_licence_is_apache_2_in_full() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert _project()["license"] == "Apache-2.0"
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence
    assert [f"   {number}. " in licence for number in range(1, 10)] == [True] * 9
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.fixture(scope="module")
def import_report() -> dict[str, object]:
    """What `import moelora` did in a new process, beyond what its dependencies do themselves."""
    code = r"""
import contextlib, io, json, logging, sys
import peft, transformers

def loggers():
    root = logging.getLogger()
    state = {"root": (root.level, [str(handler) for handler in root.handlers])}
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            handlers = [str(h) for h in logger.handlers if type(h) is not logging.NullHandler]
            state[name] = (logger.level, handlers, logger.disabled)
    return state

triton_before, before = "triton" in sys.modules, loggers()
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import moelora
untouched = (logging.NOTSET, [], False)
after = loggers()
print(json.dumps({
    "printed": printed.getvalue(),
    "imported triton": "triton" in sys.modules and not triton_before,
    "configured loggers": [n for n in after if after[n] != before.get(n, untouched)],
}))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    report: dict[str, object] = json.loads(finished.stdout.splitlines()[-1])
    return report


def test_importing_prints_nothing(import_report: dict[str, object]) -> None:
    assert import_report["printed"] == ""


def test_importing_does_not_import_triton(import_report: dict[str, object]) -> None:
    assert import_report["imported triton"] is False


def test_importing_configures_no_logging(import_report: dict[str, object]) -> None:
    assert import_report["configured loggers"] == []
