"""Do the ways agree, where mathematics says that they must, and how far apart are the others?

One pass mixes what the experts add *inside each layer*. N+1 passes mix *the logits* of whole models
with one expert each. Between the layers of a model lie nonlinear functions, so these are two
different functions of the same experts and weights. They coincide where one expert has all the
weight, and at the output of the first adapted layer. There agreement is demanded; elsewhere the
distance is reported. What one pass has to agree with for any weights is the same sum computed
slowly (:mod:`moelora.validation.slow_path`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelora.validation.candidate import Candidate, lora_layers
from moelora.validation.errors import ValidationError
from moelora.validation.own_routing import own_weights
from moelora.validation.slow_path import slow_logits
from moelora.validation.stacking import stack_experts
from moelora.validation.ways import (
    Batch,
    activate,
    automatic_config,
    final_hidden,
    mixed_logits,
)

#: The largest difference that counts as agreement, as a share of the reference's largest value.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
STACKED = "validation_stacked"


@dataclass(frozen=True)
class Comparison:
    """Two outputs held against each other.

    Attributes:
        name: what was compared with what.
        demanded: whether they must agree.
        agrees: whether the relative difference is within the tolerance.
        max_difference: largest absolute difference.
        mean_difference: mean absolute difference.
        relative_difference: the largest difference divided by the reference's largest value.
        cosine: mean cosine similarity of the tokens' vectors.
        top_1: share of tokens with the same largest logit; None where the vectors are no logits.
        kl: mean Kullback-Leibler divergence of the next-token distributions from the reference's,
            in nats; None where the vectors are no logits.
        why: why agreement is, or is not, demanded.
    """

    name: str
    demanded: bool
    agrees: bool
    max_difference: float
    mean_difference: float
    relative_difference: float
    cosine: float
    top_1: float | None
    kl: float | None
    why: str


def compare(
    name: str,
    reference: Tensor,
    other: Tensor,
    *,
    tolerance: float,
    demanded: bool,
    why: str,
    logits: bool = True,
) -> Comparison:
    """Hold two tensors ``(..., features)`` against each other, in float64.

    Args:
        name: for the report.
        reference: what ``other`` should be.
        other: of the same shape.
        tolerance: for the relative difference.
        demanded: whether they must agree.
        why: for the report.
        logits: whether the last axis is a distribution over tokens.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
        >>> compare("x, x", x, x, tolerance=0.0, demanded=True, why="the same").top_1
        1.0
    """
    if reference.shape != other.shape:
        raise ValueError(
            f"{name}: shapes {tuple(reference.shape)} and {tuple(other.shape)} must be the same."
        )
    a = reference.detach().double().flatten(0, -2)
    b = other.detach().double().flatten(0, -2)
    difference = (a - b).abs()
    largest = float(difference.max())
    scale = float(a.abs().max())
    relative = largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))
    top_1 = kl = None
    if logits:
        top_1 = float((a.argmax(-1) == b.argmax(-1)).double().mean())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl = float((log_a.exp() * (log_a - log_b)).sum(-1).mean())
    return Comparison(
        name=name,
        demanded=demanded,
        # NaN agrees with nothing
        agrees=relative <= tolerance,
        max_difference=largest,
        mean_difference=float(difference.mean()),
        relative_difference=relative,
        cosine=float(torch.cosine_similarity(a, b, dim=-1).mean()),
        top_1=top_1,
        kl=kl,
        why=why,
    )


@dataclass(frozen=True)
class Agreement:
    """What the comparisons of one checkpoint need.

    Attributes:
        candidate: the checkpoint.
        batch: the model's inputs.
        weights: routing weights ``(batch, seq, experts)`` for all layers: the router's, if the
            checkpoint has one over the whole model.
        dense: random weights of every expert for every token; a router's may be all on one expert.
        tolerance: for demanded comparisons.
        stackable: whether the experts can be one mixture.
    """

    candidate: Candidate
    batch: Batch
    weights: Tensor
    dense: Tensor
    tolerance: float
    stackable: bool

    @property
    def checks(self) -> list[Callable[[], list[Comparison]]]:
        """The comparisons to make, one call each."""
        checks = [self.one_pass, self.one_hot, self.first_layer, self.many_passes]
        if self.stackable:
            checks.append(self.stacked)
        if self.candidate.mixtures:
            checks.append(self.own_routing)
        if self.candidate.router is not None:
            checks.append(self.attached)
        return checks

    def _one_pass_logits(self, adapters: Sequence[str], weights: Tensor) -> Tensor:
        activate(self.candidate.model, adapters)
        with torch.no_grad():
            output = self.candidate.model(**self.batch, routing_weights=weights, use_cache=False)
        return output.logits  # type: ignore[no-any-return]

    def _compare(self, name: str, a: Tensor, b: Tensor, why: str, **options: Any) -> Comparison:
        options = {"demanded": True, **options}
        return compare(name, a, b, tolerance=self.tolerance, why=why, **options)

    def one_pass(self) -> list[Comparison]:
        """One pass over plain adapters against the slow sum in every layer."""
        model, experts = self.candidate.model, self.candidate.experts
        slow = slow_logits(model, experts, self.dense, self.batch)
        return [
            self._compare(
                "one pass, experts as plain adapters, every weight random / slow sum in each layer",
                slow,
                self._one_pass_logits(experts, self.dense),
                "the same sum, computed differently",
            )
        ]

    def stacked(self) -> list[Comparison]:
        """One pass over all experts as one mixture against the slow sum."""
        model, experts = self.candidate.model, self.candidate.experts
        stack_experts(model, experts, STACKED)
        try:
            slow = slow_logits(model, experts, self.dense, self.batch)
            stacked = self._one_pass_logits([STACKED], self.dense)
        finally:
            activate(model, experts)
            model.delete_adapter(STACKED)
        return [
            self._compare(
                "one pass, experts stacked to one mixture, every weight random / slow sum in each "
                "layer",
                slow,
                stacked,
                "the same sum, computed differently",
            )
        ]

    def one_hot(self) -> list[Comparison]:
        """All weight on one expert: one pass is that expert's pass of N."""
        model, experts = self.candidate.model, self.candidate.experts
        worst: Comparison | None = None
        for index, expert in enumerate(experts):
            activate(model, [expert])
            with torch.no_grad():
                alone = model(**self.batch, use_cache=False).logits
            weights = self.dense.new_zeros(len(experts))
            weights[index] = 1
            found = self._compare(
                f"one pass, weight 1 for one expert / that expert's own pass (worst of "
                f"{len(experts)})",
                alone,
                self._one_pass_logits(experts, weights),
                "one expert with all the weight is that expert's model",
            )
            # not >: NaN is the worst
            if worst is None or not found.relative_difference <= worst.relative_difference:
                worst = found
        return [] if worst is None else [worst]

    def first_layer(self) -> list[Comparison]:
        """At the first adapted layer, mixing outputs of N passes is one pass."""
        model, experts = self.candidate.model, self.candidate.experts
        name, layer = self._first_adapted()
        rest = 1 - self.dense.sum(dim=-1, keepdim=True)
        with torch.no_grad(), _output_of(layer) as outputs:
            self._one_pass_logits(experts, self.dense)
            one = outputs[-1]
            with model.disable_adapter():
                model(**self.batch, use_cache=False)
            # weights that do not sum to 1 leave the base its share
            mixed = rest.double() * outputs[-1].double().reshape(*rest.shape[:2], -1)
            for index, expert in enumerate(experts):
                activate(model, [expert])
                model(**self.batch, use_cache=False)
                own = outputs[-1].double().reshape(*rest.shape[:2], -1)
                mixed = mixed + self.dense[..., index : index + 1].double() * own
        return [
            self._compare(
                f"one pass / N passes mixed, at the output of the first adapted layer ({name})",
                mixed,
                one.reshape(mixed.shape),
                "up to there all passes read the same input, and the sum is linear",
                logits=False,
            )
        ]

    def _first_adapted(self) -> tuple[str, Any]:
        """The first layer that runs."""
        model, order = self.candidate.model, []
        handles = [
            layer.register_forward_hook(lambda *_, name=name: order.append(name))
            for name, layer in lora_layers(model).items()
        ]
        try:
            with torch.no_grad():
                model(**self.batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not order:
            raise ValidationError("The model has no adapted layer that runs.")
        return order[0].removeprefix("base_model.model."), lora_layers(model)[order[0]]

    def many_passes(self) -> list[Comparison]:
        """N+1 passes, whose logits are mixed: another function, whose distance is reported."""
        model, experts = self.candidate.model, self.candidate.experts
        one = self._one_pass_logits(experts, self.weights)
        mean = self.weights.mean(dim=1, keepdim=True)
        one_mean = self._one_pass_logits(experts, mean.expand_as(self.weights).contiguous())
        why = "logits of whole models are mixed instead of what each layer adds: not the same"
        with torch.no_grad():
            per_token = mixed_logits(model, experts, self.weights, self.batch)
            per_sequence = mixed_logits(model, experts, mean, self.batch)
        return [
            self._compare(
                "one pass / N+1 passes, weights per token", per_token, one, why, demanded=False
            ),
            self._compare(
                "one pass, the same mean weights / N+1 passes, mean weights per sequence",
                per_sequence,
                one_mean,
                why,
                demanded=False,
            ),
            self._compare(
                "one pass, weights per token / N+1 passes, mean weights per sequence",
                per_sequence,
                one,
                f"{why}; and DyLoRA-MoE's first release averaged the weights over the sequence",
                demanded=False,
            ),
        ]

    def own_routing(self) -> list[Comparison]:
        """A mixture routed by its own routers against the slow sum with what they decided."""
        model, experts = self.candidate.model, self.candidate.experts
        routed, weights = own_weights(self.candidate, self.batch)
        slow = slow_logits(model, experts, weights, self.batch)
        return [
            self._compare(
                "one pass, routed by the checkpoint's own routers / slow sum with their weights",
                slow,
                routed,
                "the same sum, computed differently",
            )
        ]

    def attached(self) -> list[Comparison]:
        """The checkpoint's router, asked in DyLoRA-MoE's way and in moelora's."""
        model, experts, router = (
            self.candidate.model,
            self.candidate.experts,
            self.candidate.router,
        )
        if router is None:
            return []
        with torch.no_grad():
            weights = router(final_hidden(model, experts, self.batch))
            old = model(**self.batch, routing_weights=weights, use_cache=False).logits
            slow = slow_logits(model, experts, weights, self.batch)
            activate(model, experts)
            model.attach_router(router, automatic_config(len(experts)))
            try:
                automatic = model(**self.batch, use_cache=False).logits
            finally:
                model.detach_router()
        return [
            self._compare(
                "two passes as DyLoRA-MoE's later release / slow sum with the same weights",
                slow,
                old,
                "the same sum, computed differently",
            ),
            self._compare(
                "two passes, router attached / two passes as DyLoRA-MoE's later release",
                old,
                automatic,
                "the first passes differ: adapters off here, all experts summed there, so that the "
                "router reads other hidden states",
                demanded=False,
            ),
        ]


class _Outputs:
    """The outputs of a layer, the last one kept."""

    def __init__(self, layer: Any) -> None:
        self.kept: list[Tensor] = []
        self.handle = layer.register_forward_hook(self._keep)

    def _keep(self, _layer: Any, _args: Any, output: Tensor) -> None:
        self.kept[:] = [output]

    def __enter__(self) -> list[Tensor]:
        return self.kept

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _output_of(layer: Any) -> _Outputs:
    return _Outputs(layer)
