"""The documentation site, built strictly: no warning, no public name or page missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moelora
import moelora.ops
from moelora.cli import COMMANDS

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason="needs the extra docs")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = sorted((DOCS / "reference").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "WARNING" not in finished.stderr, finished.stderr[-3000:]
    return folder


def html_of(site: Path) -> dict[str, str]:
    """Every page, by its path in the site."""
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
        for path in site.rglob("*.html")
    }


def entries(nav: Any) -> list[str]:
    """The files of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    nested = nav.values() if isinstance(nav, dict) else nav
    return [file for entry in nested for file in entries(entry)]


def test_every_page_is_in_the_navigation_once() -> None:
    from mkdocs.config import load_config

    files = entries(load_config(str(ROOT / "mkdocs.yml"))["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(files) == sorted(pages | {f for f in files if f.endswith(".ipynb")})


def test_every_public_name_has_one_entry_in_the_reference(site: Path) -> None:
    wanted = [f"moelora.{name}" for name in moelora.__all__]
    wanted += [f"moelora.ops.{name}" for name in moelora.ops.__all__]
    written = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    found = re.findall(r"^::: (moelora(?:\.ops)?\.\w+)$", written, flags=re.MULTILINE)
    assert sorted(found) == sorted(wanted)
    headings = re.findall(r'<h\d id="([\w.]+)"', "".join(html_of(site).values()))
    assert {name: headings.count(name) for name in wanted} == dict.fromkeys(wanted, 1)


def test_docstrings_reach_the_page_in_its_own_language(site: Path) -> None:
    """Sphinx roles are links, sections have their headings, doctests are code."""
    html = html_of(site)
    text = "".join(page for name, page in html.items() if name.startswith("reference/"))
    assert re.findall(r":(?:class|func|meth|attr|mod):", text) == []
    assert re.findall(r"<p>(?:Example|Args|Raises|Returns|Yields|Attributes):", text) == []
    assert re.findall(r"<(?:p|blockquote)>\s*(?:&gt;){3}", text) == []
    assert 'href="#moelora.Router.expand"' in html["reference/routing.html"]


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="?(?:https?:)?//')
    assert [name for name, page in html_of(site).items() if loading.search(page)] == []


def test_every_subcommand_is_on_the_page_about_the_command_line() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `moelora (\w+)", page, flags=re.MULTILINE)
    assert sorted(told) == sorted(command.__name__.rsplit(".", 1)[1] for command in COMMANDS)


def test_every_file_of_the_repository_that_a_page_names_exists() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
    named = re.compile(r"`((?:examples|benchmarks|tests)/[\w/.-]*)`")
    missing = [
        (name, file)
        for name, page in pages.items()
        for file in named.findall(page)
        if not (ROOT / file).exists()
    ]
    assert missing == []
