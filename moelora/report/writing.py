"""Reports as files, each written whole or not at all."""

import os
import secrets
from pathlib import Path

from moelora.errors import ReportError
from moelora.report.page import render_page
from moelora.report.results import RoutingReport

PAGE, DATA = "report.html", "report.json"


def check_target(out: "str | os.PathLike[str]", *, pictures: bool = False) -> Path:
    """Refuse a place that cannot take a report, before the long work.

    Args:
        out: a file ``*.html``, or a folder.
        pictures: whether pictures shall be written too.

    Raises:
        ReportError: if it is a folder named ``*.html``, a file of another name, or a single file
            for several pictures; if no folder can be made there; or if matplotlib is missing.
    """
    path = Path(out)
    single = path.suffix.lower() in (".html", ".htm")
    if single and path.is_dir():
        raise ReportError(f"{path} is a folder, so no page can be written there.")
    if single and pictures:
        raise ReportError(f"Pictures need a folder, got the file {path}.")
    if not single and path.exists() and not path.is_dir():
        raise ReportError(f"{path} must be a folder, or a file named *.html.")
    folder = path.parent if single else path
    existing = next((each for each in (folder, *folder.parents) if each.exists()), Path())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ReportError(f"{folder} cannot be written.")
    if pictures:
        from moelora.report import figures  # noqa: F401 - says what is missing
    return path


def write_report(
    report: RoutingReport, out: "str | os.PathLike[str]", *, pictures: bool = False
) -> list[Path]:
    """Write a report: the page alone to ``*.html``, or page and data into a folder.

    Files of an earlier report are replaced; others in the folder stay. All is made before the
    first file is written.

    Args:
        report: what to write.
        out: a file ``*.html``, or a folder, which need not exist.
        pictures: also write every plot as a PNG file into the folder (extra ``plots``).

    Returns:
        The files.

    Raises:
        ReportError: if they cannot be written; see `check_target`.
    """
    path = check_target(out, pictures=pictures)
    page = render_page(report).encode("utf-8")
    if path.suffix.lower() in (".html", ".htm"):
        files = {path: page}
    else:
        files = {path / PAGE: page, path / DATA: report.to_json().encode("utf-8")}
        if pictures:
            from moelora.report.figures import render_pictures

            files |= {path / name: content for name, content in render_pictures(report).items()}
    try:
        next(iter(files)).parent.mkdir(parents=True, exist_ok=True)
        for target, content in files.items():
            _write_whole(target, content)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}.") from error
    return list(files)


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
