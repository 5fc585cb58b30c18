"""Run PEFT's own tests without and with moelora, and compare them test by test.

    python tests/peft_suite/run.py
    python tests/peft_suite/run.py --quick
    python tests/peft_suite/run.py --files test_mixed.py test_lora_variants.py

PEFT's source distribution of the installed version holds the tests. pip fetches it once; it stays,
beside stand-ins for the hub's models, in a cache folder outside the repository.
The exit status is 1 if any test's result differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_suite_plugin import STOCK_VARIABLE, read_deselected

HERE = Path(__file__).parent

#: Files that need a GPU or a package that is not on the index: every test of them would skip.
LEFT_OUT = frozenset(
    {
        "test_common_gpu.py",
        "test_gpu_examples.py",
        "test_gptqmodel.py",
        "test_lora_megatron.py",
    }
)
#: Files that take most of the time and are not in the quick run.
SLOW = frozenset(
    {
        "test_custom_models.py",
        "test_decoder_models.py",
        "test_encoder_decoder_models.py",
        "test_initialization.py",
        "test_quantization.py",
        "test_stablediffusion.py",
        "test_vision_models.py",
        "test_xlora.py",
    }
)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # several OpenMP pools on few cores spin.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Result:
    """What became of one test."""

    outcome: str
    message: str = ""


ABSENT = Result("absent")


def main() -> int:
    """Fetch, build, run twice, compare."""
    arguments = _arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    source = fetch_source(arguments.cache)
    hub = build_stand_ins(arguments.cache)
    files = choose_files(source, arguments.files, quick=arguments.quick)
    print(f"{len(files)} files of {source.name}; deselected.txt has {len(read_deselected())} lines")
    results = []
    for name in (f"stock-{_digest(hub, files)}", "moelora"):
        started = time.monotonic()
        junit = arguments.cache / f"{name}.xml"
        # what PEFT does alone changes only with what the digest is taken of.
        if name == "moelora" or not junit.exists():
            run(source, hub, files, junit, workers=arguments.workers)
        results.append(dict(_read(junit)))
        counts = dict(Counter(result.outcome for result in results[-1].values()))
        print(f"{name}: {counts} in {time.monotonic() - started:.0f} s; see {junit}", flush=True)
    again = changed_tests(*results)
    if again:
        print(f"running {len(again)} changed tests again, without and with moelora", flush=True)
        for name, result in zip(("stock", "moelora"), results, strict=True):
            junit = arguments.cache / "again" / f"{name}.xml"
            junit.parent.mkdir(exist_ok=True)
            run(source, hub, [node_of(test) for test in again], junit, workers=1)
            result.update(_read(junit))
    return report(*results)


def changed_tests(stock: dict[str, Result], plugin: dict[str, Result]) -> list[str]:
    """Tests whose outcome differs; a result that does not repeat is chance, not a change.

    Args:
        stock: test id -> its result without moelora.
        plugin: the same with moelora.
    """
    return sorted(
        test for test in stock.keys() & plugin.keys() if stock[test].outcome != plugin[test].outcome
    )


def node_of(test: str) -> str:
    """The name under which pytest runs a test of the junit file, below the tests' folder.

    Args:
        test: ``tests.<module>[.<Class>]::<name>``.
    """
    where, _, name = test.partition("::")
    _, module, *classes = where.split(".")
    return "::".join([f"{module}.py", *classes, name])


def fetch_source(cache: Path) -> Path:
    """PEFT's source distribution of the installed version, unpacked.

    Args:
        cache: the folder it is kept in.
    """
    release = f"peft-{importlib.metadata.version('peft')}"
    marker = cache / release / "tests" / "__init__.py"
    if not marker.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "--dest", cache, release.replace("-", "==")], check=True)
        with tarfile.open(cache / f"{release}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
        # the distribution leaves it out, but the tests import each other relatively.
        marker.touch()
    return cache / release


def build_stand_ins(cache: Path) -> Path:
    """The folder of stand-ins, a new one for every change of what goes into it.

    Args:
        cache: the folder it is kept in.
    """
    script = HERE / "stand_ins.py"
    recipe = script.read_bytes() + importlib.metadata.version("transformers").encode()
    hub = cache / f"hub-{hashlib.sha256(recipe).hexdigest()[:12]}"
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, script, hub], check=True, env=os.environ | ENVIRONMENT | quiet)
    return hub


def choose_files(source: Path, names: list[str], *, quick: bool) -> list[str]:
    """The names of the test files to run: those asked for, else all that can run.

    Args:
        source: PEFT's unpacked source distribution.
        names: what the user asked for.
        quick: leave the slow files out.

    Raises:
        SystemExit: if PEFT has no file of that name.
    """
    available = {path.name for path in (source / "tests").glob("test_*.py")}
    if unknown := sorted(set(names) - available):
        raise SystemExit(f"{source.name} has no {unknown}; it has {sorted(available)}.")
    return sorted(names or available - LEFT_OUT - (SLOW if quick else frozenset()))


def _digest(hub: Path, files: list[str]) -> str:
    """Of all that the run without moelora depends on."""
    parts = [hub.name, *files]
    parts += [(HERE / name).read_text() for name in ("deselected.txt", "peft_suite_plugin.py")]
    for package in ("peft", "torch", "transformers", "accelerate", "diffusers", "datasets"):
        parts.append(importlib.metadata.version(package))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def run(source: Path, hub: Path, files: list[str], junit: Path, *, workers: int) -> None:
    """Run the tests once.

    Args:
        source: PEFT's unpacked source distribution.
        hub: the stand-ins for the hub's models.
        files: names of test files.
        junit: where the results go, and with another suffix the log. Its name says which run it is:
            with ``moelora``, the plugin is imported before anything is collected.
        workers: test processes.

    Raises:
        SystemExit: if pytest did not come to the end.
    """
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | ENVIRONMENT | {"HF_HUB_CACHE": str(hub), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--disable-warnings"]
    # PEFT's own options measure its coverage, and its own filters make these two errors.
    command += ["-o", "addopts=", "-W", "ignore::FutureWarning", "-W", "ignore::DeprecationWarning"]
    command += ["-p", "no:cacheprovider", "-p", "peft_suite_plugin"]
    if junit.stem == "moelora":
        command += ["-p", "moelora"]
    else:
        environment[STOCK_VARIABLE] = "1"
    if workers > 1:
        command += ["-n", str(workers)]
    unfinished = junit.with_suffix(".part")
    command += [f"--junitxml={unfinished}", *(f"tests/{file}" for file in files)]
    with junit.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, cwd=source, env=environment, stdout=log, stderr=log)
    # 0: all passed, 1: some failed; the others come from pytest itself.
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest did not come to the end; see {junit.with_suffix('.log')}.")
    unfinished.replace(junit)


def _read(junit: Path) -> Iterator[tuple[str, Result]]:
    for case in ElementTree.parse(junit).iter("testcase"):
        result = Result("passed")
        for part in case:
            if part.tag in ("failure", "error", "skipped"):
                result = Result(part.tag, part.get("message", ""))
        yield f"{case.get('classname')}::{case.get('name')}", result


def report(stock: dict[str, Result], plugin: dict[str, Result]) -> int:
    """Print what changed, and what fails in both runs and so says nothing. Return the exit status.

    Args:
        stock: test id -> its result without moelora.
        plugin: the same with moelora.
    """
    changed = 0
    for test in sorted(stock.keys() | plugin.keys()):
        before, after = stock.get(test, ABSENT), plugin.get(test, ABSENT)
        if before.outcome != after.outcome:
            changed += 1
            what = f"CHANGED from {before.outcome} to {after.outcome}"
        elif before.outcome in ("failure", "error"):
            what = "fails in both"
        else:
            continue
        print(f"{what}: {test}\n    {(after.message or before.message)[:300]!r}")
    print(f"{len(stock)} tests, {changed} changed")
    return 1 if changed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", nargs="+", default=[], help="names of test files (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"without {', '.join(sorted(SLOW))}")
    parser.add_argument("--workers", type=int, default=1, help="test processes (default: 1)")
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--cache", type=lambda text: Path(text).resolve(), default=home / "moelora")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
