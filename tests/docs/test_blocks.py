"""README.md and every page of the documentation are run as they stand, each page once."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.docs import blocks
from tests.docs.blocks import ROOT, RUN, SHOWN, all_blocks, blocks_of, pages, read, run_page


def _checks_of(page: str) -> str | None:
    """The module that knows what a page must leave: ``docs/how-to/x.md`` has ``after_x``."""
    name = f"tests.docs.after_{Path(page).stem.lower().replace('-', '_')}"
    return None if importlib.util.find_spec(name) is None else name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "page", [page for page in pages() if any(block.is_run for block in blocks_of(read(page)))]
)
def test_every_block_of_the_page_runs_and_leaves_what_it_says(page: str, tmp_path: Path) -> None:
    after = run_page(page, tmp_path)
    module = _checks_of(page)
    if module is None:
        return
    # called here, not collected as tests of their own: no page may run twice
    for name, check in vars(importlib.import_module(module)).items():
        if name.startswith("check_"):
            check(after)


def test_every_block_names_a_language_that_is_run_or_only_shown() -> None:
    wrong = [place for place, block in all_blocks() if block.language not in RUN | SHOWN]
    assert wrong == []


def test_no_fence_is_left_open() -> None:
    fences = {page: read(page).count("```") for page in pages()}
    assert {p: n for p, n in fences.items() if n != 2 * len(blocks_of(read(p)))} == {}


def test_a_block_that_is_not_run_says_why_and_there_are_few() -> None:
    runnable = [(place, block) for place, block in all_blocks() if block.language in RUN]
    left = {place: block.not_run for place, block in runnable if block.not_run is not None}
    assert [place for place, reason in left.items() if len(reason.split()) < 2] == []
    assert len(left) <= 0.15 * len(runnable), left


def test_every_mark_stands_before_a_block() -> None:
    for page in pages():
        text = read(page)
        marks = text.count("<!-- not run") + text.count("<!-- raises")
        heard = sum((block.not_run or block.raises) is not None for block in blocks_of(text))
        assert marks == heard, page


def test_marks_fences_and_indented_blocks_are_read() -> None:
    text = """
<!-- given: sql, letters.txt -->
<!-- not run: needs two GPUs -->

```bash
torchrun x.py
```

=== "A tab"

    <!-- raises: ValueError -->
    ```python title="x.py"
    if True:
        int("x")
    ```
"""
    first, second = blocks_of(text)
    assert (first.language, first.not_run, first.is_run) == ("bash", "needs two GPUs", False)
    assert (second.code, second.raises) == ('if True:\n    int("x")\n', "ValueError")
    assert blocks.given_of(text) == ["sql", "letters.txt"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("<!-- raises: KeyError -->\n```python\nint('x')\n```\n", "raised ValueError"),
        ("<!-- raises: KeyError -->\n```python\nx = 1\n```\n", "DID NOT RAISE"),
        ("```bash\nmoelora inspect nowhere\n```\n", "nowhere"),
        ("```bash\ncurl somewhere\n```\n", "cannot run 'curl'"),
        ("```bash\nmake nothing\n```\n", "no target 'nothing'"),
        ("```json\n{'a': 1}\n```\n", "Expecting property name"),
        ("<!-- given: gold -->\n", "unknown: gold"),
    ],
)
def test_a_page_that_does_not_hold_is_found(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "read", lambda page: text if page == "x.md" else read(page))
    with pytest.raises(BaseException, match=told):  # pytest's own failures are no Exception
        run_page("x.md", tmp_path)


def test_the_pages_are_those_of_this_repository() -> None:
    assert {"README.md", "docs/compose.md", "docs/migration.md", "docs/report.md"} <= set(pages())
    assert all((ROOT / page).is_file() for page in pages())
