"""The parts that pages are made of: pure functions from values to escaped HTML."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from moelora.report.palette import expert_variable, theme_css

#: Shares of a map's largest value from which on a cell's text has to change its colour.
MID, HIGH = 0.5, 0.65
SIMILAR, TOGETHER = "similar", "together"


def escape(text: object) -> str:
    """Return a value as text that is safe in HTML, in attributes too.

    Characters that HTML may not hold (half surrogates, controls) become replacement marks.
    """
    safe = "".join(
        c if c in "\n\t" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd"
        for c in str(text)
    )
    return html.escape(safe, quote=True)


def document(title: str, sections: str) -> str:
    """Return a whole page that needs nothing but itself.

    Args:
        title: of the window, not yet escaped.
        sections: HTML.
    """
    script = f"\n{_asset('page.js')}"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_policy(script)}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>\n{theme_css()}{_asset('page.css')}</style></head>\n"
        f"<body><main>\n{sections}</main>\n"
        f"<script>{script}</script></body></html>\n"
    )


def _policy(script: str) -> str:
    """Let the page's own script run and nothing else, and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def cards(pairs: Sequence[tuple[str, str]]) -> str:
    """Return figures, each with what it is."""
    inner = "".join(
        f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in pairs
    )
    return f"<div class=cards>{inner}</div>"


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    *,
    caption: str,
    columns: Sequence[str] | None = None,
    kind: str = "heat",
    key: str = "",
    of: str = "of the routing weight of a row",
    fixed: bool = False,
    beside: Sequence[Sequence[float | None]] = (),
) -> str:
    """Return shares as a coloured table with the numbers in percent, and the scale below it.

    Args:
        values: rows x columns, in ``[0, 1]``, or cosines where ``key`` is ``SIMILAR``; None is
            shown as a dash.
        rows: their names.
        caption: above the table.
        columns: their names; ``E0``, ``E1`` ... by default.
        kind: classes of the table.
        key: what the page's script fills the table with when another router is picked.
        of: what the shares are shares of.
        fixed: whatever router is picked.
        beside: a map that is compared with this one, and so shares its scale.
    """
    signed = key == SIMILAR
    names = columns or [f"E{column}" for column in range(len(values[0]))]
    heads = "".join(f"<th scope=col title='{escape(n)}'>{escape(n)}</th>" for n in names)
    # an even share lies in the middle of the scale
    least = 0.1 if key == TOGETHER else min(1.0, 2 / len(names))
    largest = scale_end([*values, *beside], least=least)
    body = "".join(
        f"<tr><th scope=row title='{escape(name)}'>{escape(name)}</th>"
        f"{''.join(_cell(value, largest, signed=signed) for value in row)}</tr>"
        for name, row in zip(rows, values, strict=True)
    )
    scale = (
        "<div class='scale both'>-1 <i></i> 1</div>"
        if signed
        else f"<div class=scale>0 % <i></i> <span data-top>{100 * largest:.0f} %</span> "
        f"{escape(of)}</div>"
    )
    data = f" data-map={key} data-least={least:.4f}" if key and not fixed else ""
    return (
        f"<figure{data}><h3>{escape(caption)}</h3>"
        f"<div class=scroll><table class='{kind}'>"
        f"<thead><tr><td class=none></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{scale}</figure>"
    )


def scale_end(values: Sequence[Sequence[float | None]], *, least: float) -> float:
    """Return where a map's scale ends: its largest value, up to the next tenth.

    Args:
        values: of the map.
        least: where it ends at least.

    Example:
        >>> scale_end([[0.21, None], [0.3, 0.0]], least=0.1)
        0.3
    """
    largest = max((value for row in values for value in row if value is not None), default=0.0)
    return max(least, math.ceil(10 * largest - 1e-9) / 10)


def _cell(value: float | None, largest: float, *, signed: bool) -> str:
    if value is None:
        return "<td class=none style='--v:0'>\N{EN DASH}</td>"
    size = min(1.0, abs(value) if signed else value / largest)
    tone = "hi" if size > HIGH else "mid" if size > MID else ""
    kind = f"{tone} minus".strip() if value < 0 else tone
    # adding zero turns -0. into 0.
    text = f"{round(value, 2) + 0.0:.2f}" if signed else f"{100 * value:.0f}"
    return f"<td class='{kind}' style='--v:{size:.3f}'>{text}</td>"


def expert_legend(experts: Sequence[str], *, buttons: bool = True) -> str:
    """Return the colours of the experts; as buttons they mark the tokens of one expert.

    Args:
        experts: their names.
        buttons: whether the page has tokens to mark.
    """
    keys = []
    for expert, name in enumerate(experts):
        inner = f"<i style='--c:{expert_variable(expert)}'></i>{escape(name)}"
        keys.append(
            f"<button type=button data-expert={expert} aria-pressed=false>{inner}</button>"
            if buttons
            else f"<span>{inner}</span>"
        )
    return f"<div class=legend>{''.join(keys)}</div>"


def router_picker(options: Sequence[str], *, chosen: int = 0) -> str:
    """Return the control that chooses a router; the page's script shows it.

    Args:
        options: their names.
        chosen: the one picked at first.
    """
    inner = "".join(
        f"<option value={index}{' selected' if index == chosen else ''}>{escape(name)}</option>"
        for index, name in enumerate(options)
    )
    return (
        "<div class=picker hidden><label for=router>Router</label>"
        f"<select id=router autocomplete=off>{inner}</select>"
        f"<input id=layer type=range min=0 max={len(options) - 1} value={chosen} step=1 "
        "autocomplete=off aria-label='Router, in the order of the model'></div>"
    )


def token_text(
    title: str,
    tokens: Mapping[str, Sequence[str]],
    weights: Sequence[Sequence[int]],
    *,
    number: int,
    reads: str | None = None,
) -> str:
    """Return a text whose tokens are coloured by the experts that serve them.

    Args:
        title: above it.
        tokens: by what routers read.
        weights: tokens x experts, of the router picked at first.
        number: of the text, among those of the page.
        reads: what that router reads; the first by default.
    """
    reads = reads or next(iter(tokens))
    inner = "".join(
        f"<div class=tokens tabindex=0 role=group data-text={number} data-reads='{escape(name)}'"
        f"{'' if name == reads else ' hidden'} "
        f"aria-label='{escape(name)} of {escape(title)}; the arrow keys go from token to token'>"
        f"{''.join(map(_token_span, pieces, weights))}</div>"
        for name, pieces in tokens.items()
    )
    return (
        f"<div class=text><h3>{escape(title)}</h3>{inner}<p class=told aria-live=polite></p></div>"
    )


def _token_span(token: str, weights: Sequence[int]) -> str:
    best = max(range(len(weights)), key=weights.__getitem__)
    # a break shows as a sign and breaks; a token without text of its own as a dot
    text = escape(token or "·").replace("\n", "⏎\n")
    return f"<span style='--c:{expert_variable(best)}'>{text}</span>"


def page_data(data: Mapping[str, Any]) -> str:
    """Return what the page's script needs, as JSON that cannot end its element.

    Args:
        data: with ``views`` (texts x routers x tokens x experts, in percent) and ``experts`` (their
            names); with ``routers`` the script fills the maps too.
    """
    text = json.dumps({**data, "similar": SIMILAR}, separators=(",", ":"))
    return (
        f"<script id=routing type=application/json>{text.replace('<', chr(92) + 'u003c')}</script>"
    )


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in pairs
    )
    return f"<table class=facts>{rows}</table>"


def _asset(name: str) -> str:
    return (resources.files("moelora.report") / "assets" / name).read_text(encoding="utf-8")
