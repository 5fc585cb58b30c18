"""Experts that come one by one: frozen ones, weights of the caller's own, an attached router."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from checks.ddp import ddp
from checks.fsdp import sharded
from checks.setup import TOKENS, Job, base, batch, full, gradients, optimizer_of, perturb, values
from moelora import ExpertManager, MoELoraConfig

NAMES = ("sql", "french", "shell")
WRAPPERS: dict[str, Callable[[nn.Module, Job], nn.Module]] = {
    "DDP": ddp,
    "FSDP2": lambda model, _job: sharded(model),
}


def managed(job: Job, *, automatic: bool) -> Any:
    """Three experts of unequal rank, the first frozen; ``automatic``: with a router over all."""
    experts = ExpertManager(base(job), r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    for number, name in enumerate(NAMES):
        experts.create_expert(name, r=4 + number)
    experts.activate_all_experts()
    if automatic:
        config = MoELoraConfig(num_experts=3, router_aux_loss_coef=0.1, balance_over_ranks=True)
        router = experts.add_router(top_k=2, moe_config=config)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(std=0.1)
        router.mark_mature()
    experts.freeze("sql")
    perturb(experts.model)
    return experts.model.to(job.device).train()


def weights_of(job: Job, step: int, rank: int | None) -> Tensor:
    """The caller's weights for a batch's tokens, of either sign."""
    rows = len(batch(job, step)["input_ids"])
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(rows, TOKENS, len(NAMES), generator=generator).to(job.device)
    return weights if rank is None else weights.chunk(job.ranks)[rank]


def _run(model: nn.Module, job: Job, rank: int | None, *, automatic: bool) -> dict[str, Tensor]:
    """Two accumulated steps: the second fails in DDP if the first left parameters unused."""
    for step in range(2):
        given = {} if automatic else {"routing_weights": weights_of(job, step, rank)}
        model(**batch(job, step, rank), **given).loss.backward()
    return gradients(model)


def check_given_weights(job: Job) -> None:
    """Each rank gives ``routing_weights`` for its own rows; a frozen expert stays frozen."""
    _check(job, "experts, one frozen, weights given", automatic=False)


def check_attached_router(job: Job) -> None:
    """A router over all experts decides by a first pass, balanced over all ranks' tokens."""
    _check(job, "experts, one frozen, a router attached", automatic=True)


def _check(job: Job, name: str, *, automatic: bool) -> None:
    reference = _run(managed(job, automatic=automatic), job, None, automatic=automatic)
    for kind, wrap in WRAPPERS.items():
        model = wrap(managed(job, automatic=automatic), job)
        frozen = {n: full(p).clone() for n, p in model.named_parameters() if ".sql." in n}
        job.compare(f"{kind}: {name}", _run(model, job, job.rank, automatic=automatic), reference)
        before = values(model)
        optimizer_of(model).step()
        now = dict(model.named_parameters())
        still = frozen and all(torch.equal(full(now[n]), frozen[n]) for n in frozen)
        moved = all(not torch.equal(value, before[n]) for n, value in values(model).items())
        job.report(f"{kind}: {name}, step", "", passed=bool(still and moved))
