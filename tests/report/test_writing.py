"""Files: written whole or not at all, pictures among them; what is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelora import ReportError, RoutingReport
from moelora.report import writing
from moelora.report.figures import render_pictures
from moelora.report.page import render_page
from moelora.report.token_picture import _laid_out
from moelora.report.writing import check_target, write_report
from tests.lm import run_python
from tests.report.tiny import made_up


def test_a_folder_gets_page_and_data(tmp_path: Path) -> None:
    report = made_up()
    files = report.save(tmp_path / "a" / "b")
    assert [path.name for path in files] == ["report.html", "report.json"]
    assert files[0].read_text(encoding="utf-8") == render_page(report)
    assert RoutingReport.from_json(files[1].read_text(encoding="utf-8")) == report
    assert len(list(files[0].parent.iterdir())) == 2


def test_a_page_alone_is_one_file(tmp_path: Path) -> None:
    (path,) = write_report(made_up(), tmp_path / "one.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    write_report(made_up(), tmp_path)
    write_report(made_up(nasty="new"), tmp_path)
    assert "new" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("domains", [1, 2])
def test_every_plot_is_a_picture(tmp_path: Path, domains: int) -> None:
    files = write_report(made_up(nasty="$x_{ é 🙂\n", domains=domains), tmp_path, pictures=True)
    pictures = {path.name for path in files if path.suffix == ".png"}
    expected = {"overview.png", "domains.png", "layers.png", "entropy.png", "training.png"}
    assert pictures >= expected | {
        "coactivation.png",
        "similarity.png",
        "position.png",
        "tokens.png",
    }
    assert ("information.png" in pictures) is (domains == 2)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n") for name in pictures)


def _spans(texts: list[str]) -> list[tuple[int, int, str]]:
    return [(piece.line, piece.column, piece.text) for piece in _laid_out(texts)]


def test_tokens_of_the_picture_are_laid_out_in_lines() -> None:
    assert _spans(["a", "", "b⏎", "c"]) == [(0, 0, "a"), (0, 1, "·"), (0, 2, "b⏎"), (1, 0, "c")]
    # a short token is not broken, a long one is
    assert _spans(["x" * 95, "word"]) == [(0, 0, "x" * 95), (1, 0, "word")]
    assert _spans(["x" * 100])[1] == (1, 0, "x" * 4)
    assert max(line for line, _, _ in _spans(["long word "] * 500)) == 5


def test_pictures_of_the_same_report_are_the_same() -> None:
    assert render_pictures(made_up()) == render_pictures(made_up())


def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.html"
    write_report(made_up(), path)
    before = path.read_bytes()

    def fail(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.Path, "replace", fail)
    with pytest.raises(ReportError, match=r"one\.html cannot be written: No space left"):
        write_report(made_up(nasty="new"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_take_a_report_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="is a folder, so no page"):
        check_target(tmp_path / "folder.html")
    with pytest.raises(ReportError, match=r"must be a folder, or a file named \*\.html"):
        check_target(tmp_path / "file")
    with pytest.raises(ReportError, match="Pictures need a folder"):
        check_target(tmp_path / "a.html", pictures=True)
    with pytest.raises(ReportError, match="cannot be written"):
        check_target(tmp_path / "file" / "below")


def test_without_matplotlib_pictures_are_refused_and_pages_are_not(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import moelora
from moelora.report.writing import check_target, write_report
from tests.report.tiny import made_up
write_report(made_up(), sys.argv[1])
try:
    check_target(sys.argv[1], pictures=True)
except moelora.ReportError as error:
    print(error)
"""
    finished = run_python(code, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "pip install 'moelora[plots]'" in finished.stdout
    assert (tmp_path / "report.html").is_file()
