"""The parts of the demo's page that a routing report does not have."""

from collections.abc import Sequence

from moelora.demo.results import DemoResults, Usage
from moelora.report.markup import escape, heat_map
from moelora.report.names import short_name

SMALL_MAPS = 6


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
