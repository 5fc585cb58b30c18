"""FSDP2: parameters in pieces on all ranks."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
    trainable,
    values,
)


def sharded(model: PeftModel, **options: Any) -> PeftModel:
    """FSDP2: every block is a group, the rest another."""
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def check_fsdp_gradients(job: Job) -> None:
    """FSDP2's gradients are the mean over ranks of one process's."""
    for scope in ("module", "layer", "model"):
        model = sharded(build(job, router_scope=scope))
        loss_of(model, job, 0, job.rank).backward()
        reference = one_process(job, joined=False, router_scope=scope)
        job.compare(f"FSDP2: gradients, scope {scope}", gradients(model), gradients(reference))


def check_fsdp_checkpointing(job: Job) -> None:
    """Blocks that are recomputed give the same gradients."""
    reference = gradients(one_process(job, joined=False))
    for use_reentrant in (False, True):
        model = build(job)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
        model = sharded(model)
        loss_of(model, job, 0, job.rank).backward()
        kind = "reentrant" if use_reentrant else "non-reentrant"
        job.compare(f"FSDP2: gradients, {kind} checkpointing", gradients(model), reference)


def check_fsdp_training(job: Job) -> None:
    """Training, saving and reloading on one process; resuming from a sharded checkpoint."""
    model = sharded(build(job))
    optimizer = optimizer_of(model)
    train(model, optimizer, job, range(3), job.rank)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=job.folder / "dcp")
    train(model, optimizer, job, range(3, STEPS), job.rank)
    reference = one_process(job, joined=False, steps=STEPS)
    compare_steps(job, f"FSDP2: parameters after {STEPS} steps", model, reference)

    resumed = sharded(build(job))
    again = optimizer_of(resumed)
    model_state, optimizer_state = get_state_dict(resumed, again)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=job.folder / "dcp")
    set_state_dict(
        resumed, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    train(resumed, again, job, range(3, STEPS), job.rank)
    found, expected = values(resumed), values(model)
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    job.report("FSDP2: resuming continues to the bit", "", passed=same)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    check_reload(job, "FSDP2", model, get_model_state_dict(model, options=options))


def check_fsdp_bfloat16(job: Job) -> None:
    """Mixed precision as FSDP2 does it: the loss falls."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(build(job), mp_policy=policy)
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, job, 0, job.rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    finite = all(loss == loss for loss in losses)
    note = f"{losses[0]:.3f} {losses[-1]:.3f}"
    job.report("FSDP2: bfloat16, the loss falls", note, passed=finite and losses[-1] < losses[0])
