"""A real browser without a window: what a page's document looks like after its script ran."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")),
    ),
    None,
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
ANSWER = "answer-of-the-test"


def _run(page: Path, *arguments: str) -> str:
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'profile'}",
        "--virtual-time-budget=2000",
    ]
    finished = subprocess.run(
        [BROWSER, *flags, *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        env={**os.environ, "HOME": str(page.parent)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-500:]
    return finished.stdout


def ask(page: str, script: str, folder: Path, *, width: int = 1000) -> Any:
    """Show ``page`` in a frame so wide and return what ``script`` says of ``view`` and ``doc``.

    Args:
        page: HTML.
        script: the body of a function of the frame's window ``view`` and document ``doc``.
        folder: for files.
        width: of the frame.
    """
    harness = (
        "<!doctype html><meta charset=utf-8><body style='margin:0'>"
        f"<iframe width={width} height=900 style='border:0' srcdoc='{html.escape(page)}'></iframe>"
        f"<pre id={ANSWER}></pre><script>addEventListener('load', () => {{"
        "const view = document.querySelector('iframe').contentWindow; const doc = view.document;"
        f"const answer = ((view, doc) => {{ {script} }})(view, doc);"
        f"document.getElementById('{ANSWER}').textContent = JSON.stringify(answer);"
        "})</script>"
    )
    path = folder / "harness.html"
    path.write_text(harness, encoding="utf-8", errors="replace")
    dumped = _run(path, "--dump-dom", "--window-size=1400,1000")
    found = re.search(f"<pre id=.{ANSWER}.>(.*?)</pre>", dumped, re.DOTALL)
    assert found is not None, dumped[-500:]
    return json.loads(html.unescape(found[1]))


def screenshot(page: str, folder: Path, *, width: int = 1000, dark: bool = False) -> bytes:
    """Return a PNG of the page's start.

    Args:
        page: HTML.
        folder: for files.
        width: of the window.
        dark: prefer the dark theme.
    """
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    picture = folder / "picture.png"
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(path, *theme, f"--window-size={width},900", f"--screenshot={picture}")
    return picture.read_bytes()


def without_policy(page: str) -> str:
    """The page without its content policy: only escaping keeps foreign text from running."""
    changed, number = re.subn(r"<meta http-equiv=Content-Security-Policy [^>]*>", "", page)
    assert number == 1
    return changed
