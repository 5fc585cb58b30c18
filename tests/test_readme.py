"""The README's commands exist. Its code is run with the documentation's: tests/docs."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT, blocks_of, read


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    shell = "\n".join(
        block.code for block in blocks_of(read("README.md")) if block.language == "bash"
    )
    commands = re.findall(r"\bmake ([a-z]+)", shell)
    assert commands == ["demo", "test"]
    assert set(commands) <= targets


def test_the_readme_links_to_the_documentation() -> None:
    links = re.findall(r"\]\((docs/[^)#]+)\)", read("README.md"))
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).is_file()] == []
