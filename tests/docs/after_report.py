"""What ``docs/report.md`` leaves."""

from __future__ import annotations

import json

from moelora.report import RoutingReport
from tests.docs.blocks import After


def check_the_files_it_names_are_there(after: After) -> None:
    text = (after.folder / "my-report" / "report.json").read_text(encoding="utf-8")
    assert RoutingReport.from_json(text) == after.names["again"]
    assert (after.folder / "my-report" / "report.html").is_file()
    assert (after.folder / "my-report.html").is_file()


def check_the_command_and_the_call_tell_the_same_kind_of_thing(after: After) -> None:
    assert json.loads(after.outcomes[1].out)["routers"] == 3
    assert after.names["report"].training.steps == [10, 20]
