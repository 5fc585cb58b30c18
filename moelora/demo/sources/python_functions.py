"""Function bodies of Python's standard library (PSF licence)."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moelora.demo.skills import Example
from moelora.demo.sources.split import Candidate

# tests and tools repeat themselves; site-packages is not the standard library
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
LONGEST_SIGNATURE = 40
LONGEST_SUMMARY = 60
SHORTEST_BODY = 20
LONGEST_BODY = 100


def python_candidates() -> Iterator[Candidate]:
    """Yield ``signature and docstring -> body`` of short functions, grouped by module."""
    home = Path(sysconfig.get_path("stdlib"))
    for path in sorted(home.rglob("*.py")):
        module = path.relative_to(home)
        if SKIPPED.isdisjoint(module.parts):
            for example in _examples(path):
                yield Candidate(example, group=module.parts[0].removesuffix(".py").strip("_"))


def _examples(path: Path) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            # old escapes in strings of others are not the user's business
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except SyntaxError:
        # the standard library carries files of broken code, for tests of its own tools
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            example = _example(node)
            if example is not None:
                yield example


def _example(function: ast.FunctionDef) -> Example | None:
    summary = " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())
    body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
    signature = f"{function.name}({ast.unparse(function.args)})"
    fits = (
        0 < len(summary) <= LONGEST_SUMMARY
        and len(signature) <= LONGEST_SIGNATURE
        and SHORTEST_BODY <= len(body) <= LONGEST_BODY
    )
    if not fits:
        return None
    return Example(f"Write the body of the Python function {signature}: {summary}", body)
