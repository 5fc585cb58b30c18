"""What subcommands share: results as one JSON object, and tables for people."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any


def to_json(result: Any) -> str:
    """Return a dataclass as one JSON object; paths become strings.

    Args:
        result: any of the library's result dataclasses.

    Example:
        >>> from moelora import RoutedDistance
        >>> print(to_json(RoutedDistance(1, 2, 0.5, 0.5, 0.0, 0.0, 1.0))[:12])
        {"texts": 1,
    """
    return json.dumps(dataclasses.asdict(result), default=str, allow_nan=False)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as columns that are as wide as they need to be; numbers stand right.

    Args:
        rows: of equal length, the first are the headings.

    Example:
        >>> print(table([("name", "rank"), ("sql", 8), ("french", 16)]))
        name    rank
        sql        8
        french    16
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(len(str(cell)) for cell in column) for column in columns]
    right = [all(isinstance(cell, int | float) for cell in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = [
            str(cell).rjust(width) if is_right else str(cell).ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    Args:
        number: how many.
        noun: in the singular.

    Example:
        >>> count(1, "layer"), count(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
