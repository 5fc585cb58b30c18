"""The picture of tokens coloured by expert. Like `figures` it needs matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch, Rectangle

from moelora.report.palette import EXPERT_COLOURS, INK, expert_colour
from moelora.report.results import RoutingReport, TokenView

COLUMNS = 96
#: Lines of one text, and texts, that a picture holds.
MOST_LINES = 6
MOST_TEXTS = 12
#: Letters of a token that goes to the next line as a whole.
UNBROKEN = 24
#: Lines of the title and the legend.
HEAD = 2.6
FONT = "DejaVu Sans Mono"
FONT_SIZE = 9.0
# advance of the font's letters, in inches; all of them are equally wide
LETTER = 1233 / 2048 * FONT_SIZE / 72
LINE = 0.24
TINT = 0.3
STRIP = 0.14


@dataclass(frozen=True)
class _Piece:
    """What of a token stands in one line: where, its text, and the token's number."""

    line: int
    column: int
    text: str
    token: int


def tokens(report: RoutingReport) -> Figure:
    """Return the start of each domain, each token in the tint of its strongest expert.

    The strip below a token is split by weight. The router is the clearest of those shown.

    Args:
        report: what to draw.
    """
    router = report.routers[report.shown[report.clearest]]
    glyphs = font_manager.get_font(font_manager.findfont(FONT))
    blocks = []
    for view in report.token_views[:MOST_TEXTS]:
        texts = [_drawable(t, glyphs) for t in view.tokens.get(router.reads, ())]
        blocks.append((view, _laid_out(texts)))
    # a title, the lines and a gap for each text
    heights = [max((piece.line for piece in pieces), default=0) + 2.6 for _, pieces in blocks]
    total = sum(heights) + HEAD
    figure = Figure(figsize=((COLUMNS + 4) * LETTER, total * LINE))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-2, COLUMNS + 2)
    axes.set_ylim(total, 0)
    axes.axis("off")
    title = _drawable(f"Who serves which token, {router.label[:50]}", glyphs)
    axes.text(0, 0.7, title, fontsize=11.5, fontweight="bold", va="center")
    top = HEAD
    for (view, pieces), height in zip(blocks, heights, strict=True):
        axes.text(0, top + 0.5, _drawable(view.domain, glyphs)[:60], color=INK, va="center")
        _draw(axes, top + 1.0, pieces, _weights(report, view), router.experts)
        top += height
    _legend(axes, [_drawable(report.experts[e], glyphs) for e in router.experts], router.experts)
    return figure


def _legend(axes: Axes, names: Sequence[str], experts: Sequence[int]) -> None:
    many = len(names) > len(EXPERT_COLOURS)
    shown = names[: len(EXPERT_COLOURS)]
    longest = max(4, (COLUMNS - 28 * many) // len(shown) - 5)
    handles = [
        Patch(color=expert_colour(expert), label=name[:longest])
        for expert, name in zip(experts, shown, strict=False)
    ]
    if many:
        handles.append(Patch(alpha=0, label="then the colours start again"))
    axes.legend(
        handles=handles,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(0, 1.2),
        bbox_transform=axes.transData,
        borderaxespad=0,
        borderpad=0,
        handlelength=1,
        columnspacing=1.2,
        ncols=len(handles),
        fontsize=8.5,
    )


def _weights(report: RoutingReport, view: TokenView) -> Sequence[Sequence[int]]:
    return view.weights[report.clearest]


def _drawable(text: str, glyphs: FT2Font) -> str:
    """The text with a sign for breaks, and a mark where the font has no letter."""
    signs = {"\n": "⏎", "\t": " ", "\r": ""}
    letters = [signs.get(letter, letter) for letter in text]
    return "".join(
        letter
        if letter in ("", "⏎") or (letter.isprintable() and glyphs.get_char_index(ord(letter)))
        else "\N{REPLACEMENT CHARACTER}"
        for letter in letters
    )


def _laid_out(texts: Sequence[str]) -> list[_Piece]:
    """Break tokens into lines, within a long token too, and after the sign of a break."""
    pieces: list[_Piece] = []
    line = column = 0
    for token, text in enumerate(texts):
        # a token without text of its own shows as a dot
        rest = text or "·"
        if column + len(rest) > COLUMNS and len(rest) <= UNBROKEN and line + 1 < MOST_LINES:
            line, column = line + 1, 0
        while rest:
            end = rest.find("⏎") + 1 or len(rest)
            part, rest = rest[: min(end, COLUMNS - column)], rest[min(end, COLUMNS - column) :]
            if part:
                pieces.append(_Piece(line, column, part, token))
            column += len(part)
            if column == COLUMNS or part.endswith("⏎"):
                line, column = line + 1, 0
            if line == MOST_LINES:
                return pieces
    return pieces


def _draw(
    axes: Axes,
    top: float,
    pieces: Sequence[_Piece],
    weights: Sequence[Sequence[int]],
    experts: Sequence[int],
) -> None:
    for piece in pieces:
        shares = weights[piece.token]
        best = max(range(len(shares)), key=shares.__getitem__)
        y, width = top + piece.line, len(piece.text)
        colour = expert_colour(experts[best])
        axes.add_patch(
            Rectangle((piece.column, y + 0.06), width - 0.1, 0.88, color=colour, alpha=TINT, lw=0)
        )
        start = float(piece.column)
        for expert, share in zip(experts, shares, strict=True):
            part = (width - 0.1) * share / max(1, sum(shares))
            axes.add_patch(
                Rectangle((start, y + 0.94 - STRIP), part, STRIP, color=expert_colour(expert), lw=0)
            )
            start += part
        axes.text(piece.column, y + 0.43, piece.text, family=FONT, fontsize=FONT_SIZE, va="center")
