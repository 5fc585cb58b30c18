"""Colours of every page and picture: Okabe and Ito's palette, told apart with any colour vision."""

INK = "#1f2933"
MUTED = "#9aa5b1"
# one hue from light to dark, so that order survives in grey
HEAT_MAP = "Blues"
# from -1 to 1; red and blue would be hard to tell apart for some
SIMILARITY_MAP = "PuOr"
EXPERT_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#7f7f7f",
)
#: The same hues, lighter, for a dark page.
DARK_EXPERT_COLOURS = (
    "#3d9fdd",
    "#E69F00",
    "#1fbf92",
    "#dc94bd",
    "#9bd6f8",
    "#ff8138",
    "#F0E442",
    "#b3b3b3",
)


def expert_colour(expert: int) -> str:
    """Return the colour of an expert; beyond eight experts the colours start again.

    Args:
        expert: its number, from 0.
    """
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def expert_variable(expert: int) -> str:
    """Return the colour of an expert as CSS that follows the page's light or dark theme.

    Args:
        expert: its number, from 0.

    Example:
        >>> expert_variable(9)
        'var(--e1)'
    """
    return f"var(--e{expert % len(EXPERT_COLOURS)})"


def theme_css() -> str:
    """Return the experts' colours as CSS variables, for light and for dark pages."""

    def block(colours: tuple[str, ...]) -> str:
        return "".join(f"--e{number}:{colour};" for number, colour in enumerate(colours))

    return (
        f":root{{{block(EXPERT_COLOURS)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{block(DARK_EXPERT_COLOURS)}}}}}\n"
    )
