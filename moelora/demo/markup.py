"""The parts of the report page: pure functions from results to escaped HTML."""

import html
import json
from collections.abc import Sequence

from moelora.demo.palette import HEAT_DARK, HEAT_LIGHT, INK, expert_colour, heat_colour
from moelora.demo.results import DemoResults, TokenView, Usage
from moelora.demo.text import short_name

SMALL_MAPS = 6
TINT = "40"
TEXT_TURNS_WHITE = 0.5


def escape(text: object) -> str:
    """Return a value as text that is safe in HTML, in attributes too."""
    return html.escape(str(text), quote=True)


def loss_rows(results: DemoResults) -> str:
    """Return the comparison as a table; the lowest loss of each row is marked.

    Args:
        results: of a run.
    """
    heads = "".join(
        f"<th scope=col>{escape(each.label)}<br>{each.parameters / 1e6:.2f} M trained</th>"
        for each in results.contenders
    )
    body = "".join(
        _loss_row(skill.name, [each.losses[skill.name] for each in results.contenders])
        for skill in results.skills
    )
    means = [each.mean_loss for each in results.contenders]
    return (
        f"<table class=losses><thead><tr><th scope=col>skill</th>{heads}</tr></thead>"
        f"<tbody>{body}{_loss_row('mean of the skills', means, kind='mean')}</tbody></table>"
    )


def _loss_row(name: str, losses: Sequence[float], *, kind: str = "skill") -> str:
    best = f"{min(losses):.3f}"
    cells = "".join(
        f"<td{' class=best' if f'{loss:.3f}' == best else ''}>{loss:.3f}</td>" for loss in losses
    )
    return f"<tr class={kind}><th scope=row>{escape(name)}</th>{cells}</tr>"


def heat_map(
    shares: Sequence[Sequence[float]], rows: Sequence[str], *, caption: str, kind: str = "heat"
) -> str:
    """Return expert shares as a coloured table with the numbers in percent.

    Args:
        shares: rows x experts, in ``[0, 1]``.
        rows: their names.
        caption: above the table.
        kind: classes of the table.
    """
    heads = "".join(f"<th scope=col>E{expert}</th>" for expert in range(len(shares[0])))
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(map(_heat_cell, row))}</tr>"
        for name, row in zip(rows, shares, strict=True)
    )
    return (
        f"<figure><h3>{escape(caption)}</h3><table class='{kind}'>"
        f"<thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></figure>"
    )


def _heat_cell(share: float) -> str:
    ink = "#fff" if share > TEXT_TURNS_WHITE else INK
    return f"<td style='background:{heat_colour(share)};color:{ink}'>{100 * share:.0f}</td>"


def heat_scale() -> str:
    """Return the legend of every heat map."""
    ends = ",".join(f"rgb{colour}" for colour in (HEAT_LIGHT, HEAT_DARK))
    return (
        "<div class=scale>0 % <i style='background:linear-gradient(90deg,"
        f"{ends})'></i> 100 % of the routing weight of a row</div>"
    )


def clearest_maps(results: DemoResults) -> str:
    """Return skills x experts for the routers that tell the skills apart best.

    Args:
        results: of a run.
    """
    usage = results.usage
    names = [skill.name for skill in results.skills]
    return "".join(
        heat_map(
            usage.shown_skills[router],
            names,
            caption=f"{short_name(usage.shown[router])} · separation "
            f"{usage.separations[router]:.2f}",
        )
        for router in clearest_order(usage)[:SMALL_MAPS]
    )


def clearest_order(usage: Usage) -> list[int]:
    """Return the positions of the shown routers, the largest separation first."""
    return sorted(range(len(usage.shown)), key=lambda router: -usage.separations[router])


def expert_legend(experts: int) -> str:
    """Return the colours of the experts.

    Args:
        experts: their number.
    """
    return "".join(
        f"<span><i style='background:{expert_colour(expert)}'></i>expert {expert}</span>"
        for expert in range(experts)
    )


def router_options(usage: Usage, *, chosen: int) -> str:
    """Return the options of the router picker.

    Args:
        usage: whose shown routers can be picked.
        chosen: the one picked at first.
    """
    return "".join(
        f"<option value={router}{' selected' if router == chosen else ''}>"
        f"{escape(short_name(name))} (separation {usage.separations[router]:.2f})</option>"
        for router, name in enumerate(usage.shown)
    )


def token_text(view: TokenView, *, router: int) -> str:
    """Return a text whose tokens are coloured by the experts that serve them.

    Args:
        view: of the text.
        router: position of the shown router.
    """
    spans = "".join(
        _token_span(token, weights)
        for token, weights in zip(view.tokens, view.weights[router], strict=True)
    )
    return f"<div class=text><h3>{escape(view.skill)}</h3><div class=tokens>{spans}</div></div>"


def _token_span(token: str, weights: Sequence[int]) -> str:
    best = max(range(len(weights)), key=weights.__getitem__)
    # a break shows as a sign and breaks; a token without text of its own as a dot
    text = escape(token or "·").replace("\n", "⏎\n")
    return f"<span style='background:{expert_colour(best)}{TINT}'>{text}</span>"


def routing_data(usage: Usage, *, experts: int) -> str:
    """Return what the page's script needs, as JSON that cannot end its element.

    Args:
        usage: of the mixture.
        experts: their number.
    """
    colours = [expert_colour(expert) for expert in range(experts)]
    data = {
        "views": [view.weights for view in usage.tokens],
        "colours": colours,
        "tints": [colour + TINT for colour in colours],
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def written_texts(results: DemoResults) -> str:
    """Return what the frozen base and the mixture wrote for one prompt of each skill.

    Args:
        results: of a run.
    """
    return "".join(
        f"<div class=text><h3>{escape(sample.skill)}</h3><dl>"
        f"<dt>prompt</dt><dd>{escape(sample.prompt)}</dd>"
        f"<dt>expected</dt><dd>{escape(sample.completion)}</dd>"
        f"<dt>frozen base</dt><dd>{escape(sample.base)}</dd>"
        f"<dt>mixture</dt><dd class=mixture>{escape(sample.mixture)}</dd></dl></div>"
        for sample in results.samples
    )


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in pairs
    )
    return f"<table class=facts>{rows}</table>"
