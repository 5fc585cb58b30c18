"""The page needs nothing but itself and runs no foreign text; the picture is a picture."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from moelora.demo.figure import draw_figure
from moelora.demo.page import render_page, write_page
from tests.demo.tiny import made_up_results

NASTY = """</script></td><img src=x onerror="alert('1')">&amp;"""


class _Outline(HTMLParser):
    """Collects elements, their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)
        self.text += data


def test_foreign_text_adds_no_element_and_shows_as_it_is() -> None:
    plain, nasty = (_Outline(render_page(made_up_results(nasty=text))) for text in ("x", NASTY))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert NASTY in nasty.text
    assert not any(name.startswith("on") for _, attributes in nasty.elements for name in attributes)


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = render_page(made_up_results())
    outline = _Outline(page)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in outline.elements}
    assert not any(
        "src" in attributes or "href" in attributes for _, attributes in outline.elements
    )
    assert not re.search(r"https?:|url\(|@import", page)


def test_the_script_reads_the_weights_of_every_token() -> None:
    results = made_up_results()
    data = json.loads(_Outline(render_page(results)).scripts[0])
    assert data["views"] == [view.weights for view in results.usage.tokens]
    assert data["experts"] == ["expert 0", "expert 1", "expert 2"]


def test_the_lowest_loss_of_a_row_is_marked() -> None:
    assert render_page(made_up_results()).count("class=best>1.900") == 1


def test_the_page_and_the_picture_are_files(tmp_path: Path) -> None:
    results = made_up_results(nasty="$x^2_é")
    write_page(results, tmp_path / "report.html")
    draw_figure(results, tmp_path / "report.png")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_page(results)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
