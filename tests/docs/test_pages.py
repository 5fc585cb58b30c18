"""What pages of the documentation say of the library's names, messages and pictures is so."""

from __future__ import annotations

import re

import pytest

import moelora
from tests.docs.blocks import ROOT, pages, prose_of, read


def _sources(pattern: str) -> str:
    # strings that are broken over lines are one message
    files = sorted((ROOT / "moelora").glob(pattern))
    return "".join(re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8")) for path in files)


def test_every_message_in_the_table_of_compose_exists_in_the_library() -> None:
    table = read("docs/compose.md").split("When something is refused")[1]
    rows = re.findall(r"^\| `([^`]+)` +\|", table, re.MULTILINE)
    assert len(rows) > 5
    plain = re.sub(r"\{[^}]*\}", "", _sources("*.py"))
    for row in rows[1:]:
        words = re.sub(r"='[^']*'|=True", "=", row).strip(". ")
        assert words.replace("use_dora", "") in plain, row


def test_every_message_in_the_table_of_migration_exists_in_the_library() -> None:
    table = read("docs/migration.md").split("## Troubleshooting")[1]
    messages = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    assert len(messages) >= 10
    sources = _sources("**/*.py")
    assert [message for message in messages if message not in sources] == []


def test_every_name_of_ours_in_the_table_of_migration_exists() -> None:
    table = read("docs/migration.md").split("## Names")[1].split("## Trouble")[0]
    names = re.findall(r"`moelora\.(\w+)", table)
    assert len(names) == 4
    assert [name for name in names if not hasattr(moelora, name)] == []


@pytest.mark.parametrize("page", pages())
def test_every_file_that_the_page_links_to_exists(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)[^)]*\)", prose_of(read(page)))
    folder = (ROOT / page).parent
    assert [link for link in links if not (folder / link).is_file()] == []


@pytest.mark.parametrize("page", pages())
def test_every_picture_of_the_page_is_small_and_described(page: str) -> None:
    for text, link in re.findall(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)", read(page)):
        picture = ((ROOT / page).parent / link).read_bytes()
        assert len(text.split()) >= 3, link
        assert len(picture) < 200_000, link
        if link.endswith(".png"):
            assert picture.startswith(b"\x89PNG\r\n"), link
