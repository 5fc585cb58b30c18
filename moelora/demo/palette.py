"""Colours of the contenders; those of experts and maps are the report's."""

from moelora.report.palette import HEAT_MAP, INK, MUTED

__all__ = ["CONTENDER_COLOURS", "CONTENDER_MARKERS", "HEAT_MAP", "INK", "MUTED"]

CONTENDER_COLOURS = {
    "base": "#7f7f7f",
    "lora": "#E69F00",
    "lora_total": "#CC79A7",
    "mixture": "#0072B2",
}
CONTENDER_MARKERS = {"base": "s", "lora": "o", "lora_total": "D", "mixture": "^"}
