"""The README: short, its commands exist, its figures are measured. Its code runs in tests/docs."""

from __future__ import annotations

import re

import pytest

from benchmarks.report import RESULTS, load, tables_of
from tests.docs.blocks import ROOT, blocks_of, prose_of, read

README = read("README.md")
TABLE = re.compile(r"<!-- benchmarks:begin headlines -->\n(.*?)<!-- benchmarks:end -->", re.DOTALL)
#: A number that someone measured: with a unit, a factor or a share.
FIGURE = re.compile(
    r"\d[\d.,]*\s*(?:ms|us|s|seconds|minutes|[kMG]i?B|%|percent|tokens/s)\b|\d[\d.,]*\s*(?:%|x\b(?!\s*\d)|times\b)"
)


def test_the_first_screen_has_code_that_prints_the_installation_and_a_picture() -> None:
    screen = "\n".join(README.splitlines()[:40])
    first = blocks_of(README)[0]
    assert first.language == "python"
    assert "print(" in first.code
    assert len([line for line in first.code.splitlines() if line]) <= 12
    assert "pip install moelora" in screen
    assert len(re.findall(r"!\[[^\]]+\]\(docs/images/[^)]+\)", screen)) == 1
    assert len(README.splitlines()) < 150


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    shell = "\n".join(block.code for block in blocks_of(README) if block.language == "bash")
    commands = re.findall(r"\bmake ([a-z]+)", shell)
    assert commands == ["demo", "test"]
    assert set(commands) <= targets


def test_the_readme_links_to_the_documentation() -> None:
    links = re.findall(r"\]\((docs/[^)#]+)\)", README)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_citation_names_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), flags=re.MULTILINE)
    assert version is not None
    assert f"version = {{{version[1]}}}" in README


def test_every_figure_of_the_readme_is_one_of_the_committed_results() -> None:
    table = TABLE.search(README)
    assert table is not None
    assert table[1].strip() == tables_of(load(RESULTS))["headlines"]
    for file in re.findall(r"\]\((benchmarks/results/[^)]+)\)", table[1]):
        assert (ROOT / file).is_file()
    assert FIGURE.findall(prose_of(TABLE.sub("", README))) == []


@pytest.mark.parametrize(
    "text", ["takes 3 ms", "12.5 MiB more", "2x faster", "40 % less", "ten times 3 times", "90% of"]
)
def test_a_figure_in_the_prose_would_be_seen(text: str) -> None:
    assert FIGURE.search(text)
