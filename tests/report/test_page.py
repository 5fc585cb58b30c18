"""The page: whole, self-contained, deaf to hostile text, and usable in a real browser."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from moelora.report.charts import entropy_chart
from moelora.report.markup import escape, heat_map, page_data, scale_end
from moelora.report.page import render_page, verdict
from moelora.report.results import Information
from tests.report.browser import ask, needs_browser, screenshot, without_policy
from tests.report.tiny import made_up

DASH = "\N{EN DASH}"
HOSTILE = (
    "</script></title></style><script>top.pwned=parent.pwned=window.pwned=1</script>"
    "<img src=x onerror=\"parent.pwned=1\">' onmouseover='parent.pwned=1 \u2028 \x00 \ud800 "
    "&amp; -->"
)


class _Outline(HTMLParser):
    """Collects elements and their attributes, and the text outside of tags."""

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


def test_foreign_text_adds_no_element_and_no_handler() -> None:
    plain, nasty = (_Outline(render_page(made_up(nasty=text))) for text in ("x", HOSTILE))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert not any(name.startswith("on") for _, attributes in nasty.elements for name in attributes)
    assert [sorted(a) for _, a in nasty.elements] == [sorted(a) for _, a in plain.elements]


def test_foreign_text_shows_as_it_is() -> None:
    text = "<b>'\"&amp; $x^2$ é 🙂"
    assert _Outline(render_page(made_up(nasty=text))).text.count(text) > 10


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = render_page(made_up())
    elements = _Outline(page).elements
    assert not {"link", "img", "iframe", "object", "embed"} & {tag for tag, _ in elements}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements)
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page


def test_the_script_gets_every_shown_router_over_all_experts() -> None:
    report = made_up()
    data = json.loads(_Outline(render_page(report)).scripts[0])
    assert data["experts"] == report.experts
    assert data["routers"][0]["domains"] == report.routers[0].domain_load
    assert data["routers"][1]["domains"] == [[0.5, None, 0.5]] * 2
    assert data["routers"][1]["together"][1] == [None, None, None]
    assert data["views"][0] == [[[60, 40, 0], [0, 0, 100]], [[50, 0, 50], [100, 0, 0]]]


@pytest.mark.parametrize("nasty", ["</script>", "<!--<script>", "\u2028"])
def test_data_cannot_end_its_element(nasty: str) -> None:
    text = page_data({"views": [], "experts": [nasty]})
    assert text.count("<") == 2
    assert json.loads(text[text.index(">") + 1 : text.rindex("<")])["experts"] == [nasty]


def test_one_domain_has_no_baseline_in_the_page() -> None:
    page = render_page(made_up(domains=1))
    assert "shuffled</h3>" not in page
    assert "Where domains part" not in page


def test_without_training_and_notes_their_sections_are_left_out() -> None:
    page = render_page(replace(made_up(), training=None, notes=[]))
    assert "Load over the training" not in page
    assert "<ul class=notes>" not in page


@pytest.mark.parametrize(
    ("information", "words"),
    [
        (Information(0.5, 0.1, 0.2), "Domains are told apart"),
        (Information(0.2, 0.1, 0.2), "Domains are not told apart"),
        (
            Information(2e-4, 0.0, 3e-5),
            "says 2e-04 bits about its expert, shuffled domains 0.000 (at most 3e-05)",
        ),
        (None, "evenly."),
    ],
)
def test_the_verdict_compares_with_chance(information: Information | None, words: str) -> None:
    assert words in verdict(replace(made_up(), information=information))


def test_a_map_shows_percent_cosines_and_dashes() -> None:
    shares = heat_map([[0.254, None]], ["row"], caption="c")
    assert ">25</td>" in shares
    assert f">{DASH}</td>" in shares
    cosines = heat_map([[-0.001, -0.75]], ["row"], caption="c", key="similar")
    assert ">0.00</td>" in cosines
    assert "class='hi minus' style='--v:0.750'>-0.75<" in cosines


def test_experts_with_names_are_not_said_to_be_numbered_by_each_router() -> None:
    named, numbered = made_up(), replace(made_up(), experts=["E0", "E1", "E2"])
    assert "An expert has the same name in every layer" in render_page(named)
    assert "Each router numbers its experts by itself" in render_page(numbered)
    mixed = replace(made_up(), experts=["a.0", "a.1", "b.0"])
    assert "Each router numbers its experts by itself" in render_page(mixed)


@pytest.mark.parametrize(
    ("experts", "levels"), [(2, "0 0.5 1"), (3, "0 0.5 1 1.5"), (64, "0 2 4 6")]
)
def test_entropy_is_read_at_round_numbers(experts: int, levels: str) -> None:
    chart = entropy_chart(["0"], [0.5], [0.9], largest=math.log2(experts))
    assert re.findall("text-anchor=end>([^<]*)<", chart) == levels.split()


def test_the_scale_ends_at_the_next_tenth() -> None:
    assert scale_end([[0.31, 0.1]], least=0.2) == pytest.approx(0.4)
    assert scale_end([[None]], least=0.5) == 0.5


def test_escaping_covers_quotes_and_what_html_may_not_hold() -> None:
    assert escape("""<a b='c' d="e">""") == "&lt;a b=&#x27;c&#x27; d=&quot;e&quot;&gt;"
    assert escape("a\x00b\ud800c\nd") == "a\ufffdb\ufffdc\nd"


# In a browser --------------------------------------------------------------------------------


@needs_browser
def test_hostile_text_does_not_run_even_without_the_policy(tmp_path: Path) -> None:
    page = without_policy(render_page(made_up(nasty=HOSTILE)))
    answer = ask(
        page,
        "return [view.pwned ?? window.pwned ?? null, doc.scripts.length, doc.images.length,"
        "view.performance.getEntriesByType('resource').length,"
        "doc.querySelectorAll('.tokens span').length]",
        tmp_path,
    )
    assert answer == [None, 2, 0, 0, 4]


@needs_browser
def test_the_policy_lets_the_pages_own_script_run(tmp_path: Path) -> None:
    script = "return [doc.querySelector('.picker').hidden, doc.querySelector('#router').value]"
    assert ask(render_page(made_up()), script, tmp_path) == [False, "0"]


@needs_browser
def test_another_router_can_be_picked_with_list_and_slider(tmp_path: Path) -> None:
    script = """
    const state = () => [
      doc.querySelector('[data-map=domains] tbody tr').innerText.trim().split(/\\s+/).slice(-3),
      doc.querySelector('[data-map=similar] tbody td').className,
      doc.querySelector('[data-stack=position] rect[data-bin="0"]').getAttribute('height'),
      doc.querySelector('.tokens span').title,
      doc.querySelector('[data-say=about]').textContent.split(':')[0],
    ];
    const first = state();
    const [select, slider] = [doc.querySelector('#router'), doc.querySelector('#layer')];
    select.value = '1'; select.dispatchEvent(new view.Event('change'));
    const second = state();
    slider.value = '0'; slider.dispatchEvent(new view.Event('input'));
    return [first, second, JSON.stringify(state()) === JSON.stringify(first), select.value];
    """
    first, second, same, chosen = ask(render_page(made_up()), script, tmp_path)
    assert first[0] == ["60", "30", "10"]
    assert second[0] == ["50", DASH, "50"]
    assert (first[1], second[1]) == ("hi", "none")
    assert float(second[2]) > float(first[2]) > 0
    assert (first[3], second[3]) == ("E0 x 60 %, E1 x 40 %", "E0 x 50 %, E2 x 50 %")
    assert second[4] == "model.layers.1"
    assert same
    assert chosen == "0"


@needs_browser
def test_what_the_script_fills_in_is_what_the_page_said_before(tmp_path: Path) -> None:
    page = render_page(made_up())
    script = """
    const cells = (d) => [...d.querySelectorAll('[data-map] td')].map((c) =>
      [c.textContent, [...c.classList].sort().join(' '), Number(c.style.getPropertyValue('--v'))]);
    const bars = (d) => [...d.querySelectorAll('[data-stack] rect')].map((b) =>
      [Number(b.getAttribute('y')), Number(b.getAttribute('height'))]);
    const plain = new view.DOMParser().parseFromString(PAGE, 'text/html');
    return [cells(plain), cells(doc), bars(plain), bars(doc)];
    """.replace("PAGE", json.dumps(page).replace("</", "<\\/"))
    cells, cells_after, bars, bars_after = ask(page, script, tmp_path)
    assert cells == cells_after
    assert len(cells) > 20
    assert bars == bars_after


@needs_browser
def test_tokens_can_be_read_and_experts_marked_with_the_keyboard(tmp_path: Path) -> None:
    script = """
    const text = doc.querySelector('.tokens');
    const press = (key) => text.dispatchEvent(new view.KeyboardEvent('keydown', {key}));
    const told = () => doc.querySelector('.told').textContent;
    text.focus();
    const seen = [doc.activeElement === text];
    press('ArrowRight'); seen.push(told());
    press('ArrowRight'); seen.push(told());
    press('ArrowRight'); seen.push(told());
    press('ArrowLeft'); seen.push(told());
    const button = doc.querySelector('button[data-expert="2"]');
    button.click();
    seen.push(button.getAttribute('aria-pressed'));
    seen.push([...text.children].map((span) => span.classList.contains('dim')));
    button.click();
    seen.push(text.querySelectorAll('.dim').length);
    return seen;
    """
    assert ask(render_page(made_up()), script, tmp_path) == [
        True,
        "token 0: E0 x 60 %, E1 x 40 %",
        "token 1: E2 x 100 %",
        "token 1: E2 x 100 %",
        "token 0: E0 x 60 %, E1 x 40 %",
        "true",
        [True, False],
        0,
    ]


@needs_browser
@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("nasty", ["x", "a-very-long-name-without-any-break" * 4])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int, nasty: str) -> None:
    script = "return [doc.documentElement.scrollWidth, view.innerWidth, doc.body.innerText.length]"
    wide, window, letters = ask(render_page(made_up(nasty=nasty)), script, tmp_path, width=width)
    assert wide <= window == width
    assert letters > 1000


@needs_browser
def test_text_has_contrast_in_both_themes(tmp_path: Path) -> None:
    pictures = {
        dark: matplotlib.image.imread(
            io.BytesIO(screenshot(render_page(made_up()), tmp_path, dark=dark)), format="png"
        )[..., :3]
        for dark in (False, True)
    }
    assert pictures[False][2, 2].min() == 1.0
    assert pictures[True][2, 2].max() < 0.2
    for picture in pictures.values():
        assert picture.max() - picture.min() > 0.8
