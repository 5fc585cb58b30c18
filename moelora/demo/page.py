"""The report page of a demo run: one HTML file that needs nothing else."""

from pathlib import Path

from moelora.demo.markup import clearest_maps, clearest_order, loss_rows, written_texts
from moelora.demo.results import DemoResults, verdict
from moelora.report import markup
from moelora.report.names import short_name


def write_page(results: DemoResults, path: Path) -> None:
    """Write the report of a run as one self-contained HTML file.

    Args:
        results: of the run.
        path: of the file to write.
    """
    path.write_text(render_page(results), encoding="utf-8")


def render_page(results: DemoResults) -> str:
    """Return the report of a run as HTML, every foreign text escaped.

    Args:
        results: of the run.
    """
    parts = (_head, _losses, _load, _clearest, _tokens, _texts, _setup)
    return markup.document("moelora demo", "".join(part(results) for part in parts))


def _head(results: DemoResults) -> str:
    settings = results.settings
    figures = [
        (f"{results.contender('mixture').mean_loss:.3f}", "mean validation loss of the mixture"),
        (f"{results.contender('lora').mean_loss:.3f}", results.contender("lora").label),
        (f"{results.contender('base').mean_loss:.3f}", "frozen base"),
        (f"{results.reload_difference:g}", "largest difference of the logits after reloading"),
        (f"{sum(results.seconds.values()) / 60:.1f} min", "for the whole run"),
    ]
    return (
        f"<h1>{settings['experts']} experts, {settings['top_k']} per token, "
        f"{len(results.skills)} skills</h1>"
        f"<p class=lead>{markup.escape(verdict(results))}</p>"
        f"<p class=note>{markup.escape(settings['model'])}</p>{markup.cards(figures)}"
    )


def _losses(results: DemoResults) -> str:
    return (
        "<h2>What each adapter learned</h2>"
        "<p>Mean loss of the completion on validation texts, in nats per token; less is better. "
        f"Every adapter was trained for {results.settings['steps']} steps on the same batches in "
        "the same order, with the same optimiser, learning rate, target modules and "
        "<code>lora_alpha / r</code>; none of these was tuned for one of them. Differences below "
        f"0.02 are noise.</p><div class=scroll>{loss_rows(results)}</div>"
    )


def _load(results: DemoResults) -> str:
    usage = results.usage
    skills = [skill.name for skill in results.skills]
    layers = [str(layer) for layer in range(len(usage.layers))]
    return (
        "<h2>How the load spreads</h2>"
        "<p>Share of each expert in the routing weight of the validation tokens. Each adapted "
        "layer has a router of its own, and expert 0 of one has nothing to do with expert 0 of "
        "another: these means show balance, the next section shows specialisation.</p>"
        f"<div class=maps>{markup.heat_map(usage.skills, skills, caption='Skills x experts')}"
        f"{markup.heat_map(usage.layers, layers, caption='Layers x experts', kind='heat tall')}"
        "</div>"
    )


def _clearest(results: DemoResults) -> str:
    usage = results.usage
    return (
        "<h2>Where skills part</h2>"
        "<p>The routers that tell the skills apart best. Their separation is the mean total "
        "variation distance between the expert shares of a skill and those of all skills: 0 if "
        "all skills use the experts alike. Over all routers it is "
        f"<b>{usage.mean_separation:.3f}</b>; the same texts sorted into skills at random give "
        f"<b>{usage.shuffled_separation:.3f}</b>.</p>"
        f"<div class=small>{clearest_maps(results)}</div>"
    )


def _tokens(results: DemoResults) -> str:
    usage = results.usage
    experts = [f"expert {expert}" for expert in range(len(usage.skills[0]))]
    chosen = clearest_order(usage)[0]
    options = [
        f"{short_name(name)} (separation {usage.separations[router]:.2f})"
        for router, name in enumerate(usage.shown)
    ]
    texts = "".join(
        markup.token_text(view.skill, {"tokens": view.tokens}, view.weights[chosen], number=number)
        for number, view in enumerate(usage.tokens)
    )
    data = {"views": [view.weights for view in usage.tokens], "experts": experts}
    return (
        "<section><h2>Who serves which token</h2>"
        "<p>The first validation text of each skill, prompt and completion. A token has the tint "
        "of its strongest expert; the strip below it is split by routing weight. Point at a token, "
        "or go to a text and use the arrow keys, to read its weights; press an expert to see only "
        "its tokens. Of each layer the router with the largest separation can be picked.</p>"
        f"{markup.router_picker(options, chosen=chosen)}{markup.expert_legend(experts)}{texts}"
        f"</section>{markup.page_data(data)}"
    )


def _texts(results: DemoResults) -> str:
    return (
        "<h2>What they write</h2>"
        "<p>Greedy continuations, with the key-value cache, written by the mixture after it was "
        f"saved and loaded in a new process.</p><div class=texts>{written_texts(results)}"
        "</div>"
    )


def _setup(results: DemoResults) -> str:
    sources = [
        (
            skill.name,
            f"{skill.source}; {skill.train} training and {skill.valid} validation texts"
            + (f", {skill.truncated} cut to fit" if skill.truncated else ""),
        )
        for skill in results.skills
    ]
    seconds = [(name, f"{value:.1f} s") for name, value in results.seconds.items()]
    return (
        f"<h2>Text</h2>{markup.facts(sources)}"
        f"<h2>Settings</h2>{markup.facts(list(results.settings.items()))}"
        f"<h2>Versions</h2>{markup.facts(list(results.versions.items()))}"
        f"<h2>Time</h2>{markup.facts(seconds)}"
    )
