"""Reports: figures are what they say, and every text is shown and escaped."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from moelora.validation import charts
from moelora.validation.markdown import to_markdown
from moelora.validation.page import to_html
from moelora.validation.results import to_json, usage_of
from moelora.validation.wording import verdict
from tests.validation.made_up import NASTY, report, speed


def test_ratios_are_those_of_medians_and_of_parameters_with_peaks() -> None:
    four = speed(4)
    assert four.speed_up("n_plus_1") == 5 / 1.25
    assert four.speed_up("two_passes", training=True) == pytest.approx(2.5 / 1.25)
    assert four.speed_up("base", training=True) is None
    assert four.speed_up("absent") is None
    assert four.memory_ratio() == (1000 + 150) / (1000 + 100)
    assert four.memory_ratio(training=True) == (1000 + 300) / (1000 + 200)


def test_without_a_single_pass_the_attached_router_is_the_new_way() -> None:
    four = speed(4)
    rest = dataclasses.replace(four, ways=four.ways[:-1])
    assert rest.new.way == "attached"
    assert rest.speed_up("n_plus_1") == 2.5


def test_memory_that_was_not_measured_is_not_made_up() -> None:
    four = speed(4)
    blind = [dataclasses.replace(way, forward_peak=None) for way in four.ways]
    assert dataclasses.replace(four, ways=blind).memory_ratio() is None
    assert "not measured" in to_html(
        dataclasses.replace(
            report(), speed=[dataclasses.replace(four, ways=blind)], memory_method=None
        )
    )


def test_json_holds_everything_and_no_nan() -> None:
    content = json.loads(to_json(report(agrees=False)))
    assert content["agrees"] is False
    assert content["comparisons"][0]["max_difference"] == "nan"
    assert content["speed"][1]["experts"] == 4
    assert content["speed_ups"][1]["forward"]["n_plus_1"] == 4.0
    assert content["speed_ups"][0]["memory_to_one_lora"]["forward"] == 1150 / 1100
    assert content["usage"]["over_time"] == [[0.75, 0.25], [0.5, 0.5]]


def test_the_verdict_says_what_fails() -> None:
    assert verdict(report())[0] == (
        "All 1 comparisons that must agree do, within 0.0001 of the largest value."
    )
    assert verdict(report(agrees=False))[0].startswith("DISAGREEMENT: 1 of 1 comparisons")
    assert "4.00 times as fast as N+1 passes" in verdict(report())[2]


class _Tags(HTMLParser):
    """The open tags, and whether every one of them was closed."""

    VOID = ("meta", "br", "line", "circle", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("usage", [True, False])
def test_the_page_is_one_file_with_its_charts_and_nothing_foreign_in_it(usage: bool) -> None:
    page = to_html(report(text=NASTY, agrees=False, usage=usage))
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == (3 if usage else 1)
    assert page.count("&lt;script&gt;") >= 4
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|url\(", page)
    assert "class='verdict bad'" in page


def test_markdown_tables_keep_their_columns_whatever_the_text() -> None:
    text = to_markdown(report(text=NASTY))
    assert "<script>" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "the checkpoint has no router" in to_markdown(report(usage=False)).lower()


def test_usage_counts_weights_and_measures_entropy() -> None:
    batch = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.52, 0.48]])
    found = usage_of([batch, batch[:1]])
    assert found is not None
    assert found.over_time[1] == [1.0, 0.0]
    assert found.over_time[0] == pytest.approx([2.02 / 3, 0.98 / 3])
    assert found.histogram[0] == [0] * 10 + [2] + [0] * 8 + [2]
    assert sum(found.histogram[1]) == 4
    entropy = (
        -(0.52 * torch.tensor(0.52).log() + 0.48 * torch.tensor(0.48).log())
        / torch.tensor(2.0).log()
    )
    assert found.entropy == pytest.approx(((0 + 1 + float(entropy)) / 3 + 0) / 2, rel=1e-5)
    assert usage_of([]) is None


def test_lines_reach_the_heights_of_their_values() -> None:
    drawing = charts.lines({"a": [0.0, 4.0]}, ticks=[2, 4], x_label="x", y_label="y", title="a < b")
    heights = [float(y) for y in re.findall(r"<circle cx='[\d.]+' cy='([\d.]+)'", drawing)]
    assert heights == [charts.HEIGHT - charts.BOTTOM, charts.TOP]
    assert "<title>a &lt; b</title>" in drawing


def test_stacked_bars_fill_their_sum() -> None:
    drawing = charts.stacked(
        {"a": [0.25], "b": [0.75]}, ticks=[0], x_label="x", y_label="y", title="t"
    )
    heights = [float(h) for h in re.findall(r"height='([\d.]+)' fill", drawing)][:2]
    whole = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert heights == pytest.approx([0.25 * whole, 0.75 * whole], abs=0.1)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 1.0, 7.3, 99.0, 1234.5])
def test_an_axis_ends_at_a_round_number_not_far_above(value: float) -> None:
    top = charts._nice(value)
    assert top >= value
    assert value == 0 or top <= 2 * value
