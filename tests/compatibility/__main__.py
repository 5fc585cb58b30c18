"""Write the page: ``python -m tests.compatibility``."""

from tests.compatibility.page import PAGE, render

PAGE.parent.mkdir(exist_ok=True)
PAGE.write_text(render(), encoding="utf-8")
