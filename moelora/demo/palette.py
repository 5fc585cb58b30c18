"""Colours of the report: Okabe and Ito's palette, told apart with any colour vision."""

INK = "#1f2933"
MUTED = "#9aa5b1"
# one hue from light to dark, so that order survives in grey
HEAT_MAP = "Blues"
HEAT_LIGHT, HEAT_DARK = (247, 251, 255), (8, 48, 107)
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
CONTENDER_COLOURS = {
    "base": "#7f7f7f",
    "lora": "#E69F00",
    "lora_total": "#CC79A7",
    "mixture": "#0072B2",
}
CONTENDER_MARKERS = {"base": "s", "lora": "o", "lora_total": "D", "mixture": "^"}


def expert_colour(expert: int) -> str:
    """Return the colour of an expert; beyond eight experts the colours start again.

    Args:
        expert: its number, from 0.
    """
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def heat_colour(share: float) -> str:
    """Return the background of a heat map's cell, as CSS.

    Args:
        share: from 0, nearly white, to 1, dark blue.
    """
    channels = (
        round(light + (dark - light) * share)
        for light, dark in zip(HEAT_LIGHT, HEAT_DARK, strict=True)
    )
    return f"rgb({','.join(map(str, channels))})"
