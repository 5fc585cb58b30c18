"""What a routing report holds, as plain data: everything its pages and pictures show."""

import dataclasses
import json
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moelora.errors import ReportError

FORMAT = "moelora-routing-report"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Information:
    """How much the domain of a token says about its expert, in bits, and what chance would give.

    Attributes:
        observed: mutual information of domain and expert.
        shuffled_mean: its mean over permutations of the domains' labels.
        shuffled_max: the largest of those.
    """

    observed: float
    shuffled_mean: float
    shuffled_max: float


@dataclass(frozen=True)
class DomainSummary:
    """How much text of a domain was read.

    Attributes:
        name: as given.
        source: where it came from.
        texts: texts with at least one token.
        passages: pieces of at most ``max_length`` tokens; labels are shuffled passage by passage.
        tokens: real tokens, as the first stack of the model reads them.
        complete: False if reading stopped at ``max_tokens``.
    """

    name: str
    source: str
    texts: int
    passages: int
    tokens: int
    complete: bool


@dataclass(frozen=True)
class RouterReport:
    """What one router did. Loads are shares of routing weight and sum to 1 over the experts.

    Attributes:
        name: of the module, block or model it serves.
        label: a shorter name.
        layer: position in the report's ``layers``.
        reads: ``"tokens"``, or ``"encoder tokens"`` or ``"decoder tokens"``.
        experts: positions, in the report's ``experts``, of those it chooses from.
        tokens: tokens it gave any weight.
        load: per expert.
        served: per expert, the share of tokens for which its weight is not 0.
        domain_load: domains x experts.
        shuffled_load: the same with the labels of one permutation; None with one domain.
        information: of domains about experts; None with one domain.
        token_entropy: mean entropy of a token's shares, in bits.
        load_entropy: entropy of the load, in bits.
        coactivation: experts x experts, the share of tokens that both serve; the diagonal is
            ``served``.
        similarity: experts x experts, cosine of their updates in the layers that this router
            serves; None where an update is zero, and as a whole where it cannot be had.
        by_position: bins of the position in a passage x experts; None for empty bins.
        by_order: bins of the order of the data x experts; None for empty bins.
    """

    name: str
    label: str
    layer: int
    reads: str
    experts: list[int]
    tokens: int
    load: list[float]
    served: list[float]
    domain_load: list[list[float]]
    shuffled_load: list[list[float]] | None
    information: Information | None
    token_entropy: float
    load_entropy: float
    coactivation: list[list[float]]
    similarity: list[list[float | None]] | None
    by_position: list[list[float] | None]
    by_order: list[list[float] | None]


@dataclass(frozen=True)
class LayerReport:
    """Means over the routers of one transformer block (or of what lies outside of blocks)."""

    name: str
    load: list[float]
    token_entropy: float
    load_entropy: float
    information: Information | None


@dataclass(frozen=True)
class TokenView:
    """The start of a domain's first passage and who serves each token.

    Attributes:
        domain: its name.
        tokens: their texts, by what routers read (``RouterReport.reads``).
        weights: for each of the report's ``shown`` routers tokens x experts, in percent.
    """

    domain: str
    tokens: dict[str, list[str]]
    weights: list[list[list[int]]]


@dataclass(frozen=True)
class TrainingLoads:
    """Loads over a training, from the trainer's log: steps x experts, the mean over routers."""

    steps: list[int]
    loads: list[list[float]]


@dataclass(frozen=True)
class RoutingReport:
    """All that a routing report shows.

    Attributes:
        model: its name.
        experts: their names, in the order of every column.
        router_scope: ``"module"``, ``"layer"``, ``"model"``, ``"attached"`` or ``"fixed"``.
        domains: in the order of every row.
        routers: every router that was recorded.
        layers: in the order of the model.
        load: per expert, the mean over routers.
        domain_load: domains x experts, the mean over routers.
        shuffled_load: the same with the labels of one permutation; None with one domain.
        information: the mean over routers; None with one domain.
        positions: names of the bins of ``by_position``.
        order: the domain of each bin of ``by_order``, as its position in ``domains``.
        similarity: experts x experts, cosine of their whole updates, as in ``RouterReport``.
        training: loads over a training, if a log was given.
        shown: positions of the routers whose single tokens are kept.
        token_views: one of each domain.
        settings: what the report was made with.
        notes: what a reader has to know beside the figures.
    """

    model: str
    experts: list[str]
    router_scope: str
    domains: list[DomainSummary]
    routers: list[RouterReport]
    layers: list[LayerReport]
    load: list[float]
    domain_load: list[list[float]]
    shuffled_load: list[list[float]] | None
    information: Information | None
    positions: list[str]
    order: list[int]
    similarity: list[list[float | None]] | None
    training: TrainingLoads | None
    shown: list[int]
    token_views: list[TokenView]
    settings: dict[str, str | int | float | None]
    notes: list[str]

    def to_json(self) -> str:
        """Return the report as JSON; :meth:`from_json` reads it back without loss."""
        tree = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        text = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)
        # rows of numbers stay rows; within a string no line ever breaks
        text = re.sub(r"\[\n([-+.,\d\senul]+?)\n *\]", _one_line, text) + "\n"
        # half a surrogate pair is in no file, but may be in a name
        return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)

    @classmethod
    def from_json(cls, text: str) -> "RoutingReport":
        """Read what :meth:`to_json` wrote.

        Args:
            text: the JSON.

        Raises:
            ReportError: if it is no such report.
        """
        try:
            tree = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"A routing report must be JSON: {error}.") from error
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise ReportError(f"This JSON is no routing report: its format must be {FORMAT!r}.")
        version = tree.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ReportError(
                f"format_version of a routing report must be {FORMAT_VERSION}, got {version!r}."
            )
        report: RoutingReport = _decode(cls, tree, "report")
        return report

    def save(self, out: "str | os.PathLike[str]", *, pictures: bool = False) -> list[Path]:
        """Write the report as a page, see :func:`moelora.report.write_report`.

        Args:
            out: a file ``*.html``; or a folder, which gets ``report.html`` and ``report.json``.
            pictures: also write every plot as a PNG file into the folder (extra ``plots``).

        Returns:
            The files written.

        Raises:
            ReportError: if they cannot be written.
        """
        from moelora.report.writing import write_report

        return write_report(self, out, pictures=pictures)

    @property
    def clearest(self) -> int:
        """Position in ``shown`` of the router that tells domains, or tokens, apart best."""

        def clarity(position: int) -> float:
            router = self.routers[self.shown[position]]
            seen = router.information
            return router.load_entropy - router.token_entropy if seen is None else seen.observed

        return max(range(len(self.shown)), key=clarity)

    def summary(self) -> dict[str, Any]:
        """Return the figures that fit on a screen."""
        return {
            "model": self.model,
            "router_scope": self.router_scope,
            "experts": self.experts,
            "routers": len(self.routers),
            "load": dict(zip(self.experts, self.load, strict=True)),
            "domains": {
                domain.name: {
                    "tokens": domain.tokens,
                    "passages": domain.passages,
                    "load": dict(zip(self.experts, load, strict=True)),
                }
                for domain, load in zip(self.domains, self.domain_load, strict=True)
            },
            "information": None
            if self.information is None
            else dataclasses.asdict(self.information),
            "token_entropy": round(_mean([each.token_entropy for each in self.routers]), 6),
            "load_entropy": round(_mean([each.load_entropy for each in self.routers]), 6),
            "notes": self.notes,
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers.group(1).split())}]"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of a report")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON value against a type of the dataclasses above, and make it."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), value, where)
    if origin is list and isinstance(value, list):
        (item,) = typing.get_args(kind)
        return [_decode(item, one, f"{where}[{index}]") for index, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        return {key: _decode(item, one, f"{where}[{key!r}]") for key, one in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    if kind is type(None) and value is None:
        return None
    raise ReportError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.60}.")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ReportError(f"{where} must have the fields {sorted(hints)}, got {got!r:.200}.")
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in hints})


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds:
        if len(kinds) == 1 or type(value) is kind:
            return _decode(kind, value, where)
    names = [kind.__name__ for kind in kinds]
    raise ReportError(f"{where} must be one of {names}, got {value!r:.60}.")
