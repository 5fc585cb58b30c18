"""DDP, as ``torchrun`` scripts use it: gradients, balance over ranks, training."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checks.setup import (
    STEPS,
    Job,
    build,
    check_reload,
    compare_steps,
    gradients,
    loss_of,
    one_process,
    optimizer_of,
    train,
)


def ddp(model: nn.Module, job: Job) -> DistributedDataParallel:
    """Wrapped as `torchrun` scripts do, without looking for unused parameters."""
    devices = [job.device] if job.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def check_ddp_gradients(job: Job) -> None:
    """DDP's gradients are the mean over ranks of one process's."""
    for scope in ("module", "layer", "model"):
        model = ddp(build(job, router_scope=scope), job)
        loss_of(model, job, 0, job.rank).backward()
        reference = one_process(job, joined=False, router_scope=scope)
        job.compare(f"DDP: gradients, scope {scope}", gradients(model), gradients(reference))


def check_balance_over_ranks(job: Job) -> None:
    """With balance_over_ranks they are those of the joined batch."""
    for loss_type in ("aux_loss", "switch", "z_loss"):
        options = {"load_balance_loss_type": loss_type, "router_aux_loss_coef": 1.0}
        model = ddp(build(job, balance_over_ranks=True, **options), job)
        loss_of(model, job, 0, job.rank).backward()
        reference = one_process(job, joined=True, **options)
        name = f"DDP: gradients, balance over ranks, {loss_type}"
        job.compare(name, gradients(model), gradients(reference))


def check_sparse(job: Job) -> None:
    """Experts that no token of any rank chose are no unused parameters."""
    fields = {"num_experts": 64, "top_k_experts": 1, "r": 1, "router_aux_loss_coef": 0.0}
    model = ddp(build(job, **fields), job)
    for step in range(3):
        loss_of(model, job, step, job.rank).backward()
    reference = build(job, **fields)
    for step in range(3):
        for rank in range(job.ranks):
            (loss_of(reference, job, step, rank) / job.ranks).backward()
    job.compare("DDP: 64 experts, one per token", gradients(model), gradients(reference))


def check_checkpointing(job: Job) -> None:
    """Blocks that are recomputed give the same gradients."""
    reference = gradients(one_process(job, joined=False))
    for use_reentrant in (False, True):
        model = build(job)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        wrapped = ddp(model, job)
        loss_of(wrapped, job, 0, job.rank).backward()
        kind = "reentrant" if use_reentrant else "non-reentrant"
        job.compare(f"DDP: gradients, {kind} checkpointing", gradients(wrapped), reference)


def check_ddp_training(job: Job) -> None:
    """Some steps of AdamW end where one process ends; the saved mixture reloads to the bit."""
    model = ddp(build(job), job)
    train(model, optimizer_of(model), job, range(STEPS), job.rank)
    reference = one_process(job, joined=False, steps=STEPS)
    compare_steps(job, f"DDP: parameters after {STEPS} steps", model, reference)
    check_reload(job, "DDP", model.module, model.module.state_dict())
