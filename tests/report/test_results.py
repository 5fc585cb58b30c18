"""The report as JSON: there and back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moelora import ReportError
from moelora.report.results import RoutingReport
from tests.report.tiny import made_up

NASTY = '[ 1,\u2028 2 ] \\ " </script> \x00 é \u202e'


@pytest.mark.parametrize("domains", [1, 2])
@pytest.mark.parametrize("nasty", ["x", NASTY, "[\n1\n]", "\ud800 \udfff"])
def test_json_is_read_back_without_loss(domains: int, nasty: str) -> None:
    report = made_up(nasty=nasty, domains=domains)
    stored = report.to_json().encode("utf-8")
    assert RoutingReport.from_json(stored.decode("utf-8")) == report


def test_rows_of_numbers_are_rows_of_the_file() -> None:
    assert "[1.0, -0.5, null]" in made_up().to_json()


def test_the_summary_is_json_with_loads_by_name() -> None:
    report = made_up()
    summary = json.loads(json.dumps(report.summary()))
    assert summary["load"] == {"E0 x": 0.45, "E1 x": 0.125, "E2 x": 0.425}
    assert summary["domains"]["a x"]["load"]["E0 x"] == 0.6
    assert summary["information"]["observed"] == 0.4
    assert made_up(domains=1).summary()["information"] is None


def _with(**changes: Any) -> str:
    return json.dumps({**json.loads(made_up().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[1]", "its format must be"),
        ('{"format": "other"}', "its format must be"),
        (_with(format_version=2), "format_version of a routing report must be 1, got 2"),
        (_with(extra=1), "report must have the fields"),
        (_with(load=["a"]), r"report.load\[0\] must be float, got 'a'"),
        (_with(load=[True]), r"report.load\[0\] must be float, got True"),
        (_with(experts=3), "report.experts must be list"),
        (_with(information=[1]), "report.information must have the fields"),
        (_with(settings={"a": []}), r"report.settings\['a'\] must be one of"),
        (_with(load=[float("nan")]), "NaN is no number"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        RoutingReport.from_json(text)


def test_whole_numbers_are_floats_too() -> None:
    assert RoutingReport.from_json(_with(load=[1, 0, 0])).load == [1.0, 0.0, 0.0]
