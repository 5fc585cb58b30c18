"""Write the page: ``python -m tests.architecture_table``."""

from tests.architecture_table.page import PAGE, render

PAGE.write_text(render(), encoding="utf-8")
