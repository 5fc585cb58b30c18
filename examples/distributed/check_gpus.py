"""Train a mixture on several processes, compare it with one, save, reload, resume; print a report.

    python examples/distributed/check_gpus.py                  # two GPUs, NCCL
    python examples/distributed/check_gpus.py --device cpu     # two processes, gloo

Builds its own model, so it needs no network; exit code 1 if a check fails. A number beside a check
is the largest difference from one process on the joined batch, relative to the largest value.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig

ROWS_PER_RANK, TOKENS, STEPS, RATE = 4, 16, 5, 1e-3
CPU_TOLERANCE, GPU_TOLERANCE = 1e-4, 2e-3


@dataclass
class Job:
    """What one process knows: its place, its device, and what it has found so far."""

    rank: int
    ranks: int
    device: torch.device
    folder: Path
    tolerance: float
    results: list[dict[str, Any]] = field(default_factory=list)

    def report(self, name: str, note: str, *, passed: bool) -> None:
        """Keep the result of a check; the first process prints it."""
        self.results.append({"check": name, "passed": passed, "note": note})
        if self.rank == 0:
            print(f"{'ok  ' if passed else 'FAIL'}  {name:<58} {note}", flush=True)

    def compare(self, name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Compare tensors by name, on every rank alike."""
        missing = found.keys() ^ expected.keys()
        error = max((_difference(found[key], expected[key]) for key in found), default=0.0)
        passed = not missing and bool(found) and error <= self.tolerance
        note = f"{error:.1e}" + (f", {len(missing)} missing" if missing else "")
        self.report(name, note, passed=passed)


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = expected.float().abs().max().clamp(min=1e-12)
    return float((found.float().to(scale.device) - expected.float()).abs().max() / scale)


# The model and its batches ---------------------------------------------------------------------


def build(job: Job, **fields: Any) -> PeftModel:
    """The same mixture on every rank, its experts and routers far from their initial values."""
    torch.manual_seed(0)
    wide = job.device.type == "cuda"
    sizes = LlamaConfig(
        vocab_size=512,
        hidden_size=256 if wide else 32,
        intermediate_size=512 if wide else 64,
        num_hidden_layers=4 if wide else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    options = {"r": 4, "num_experts": 8, "top_k_experts": 2, "router_aux_loss_coef": 0.1}
    config = MoELoraConfig(
        **{
            **options,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            "router_type": "learned",
            # counted over a rank's batch, so ranks differ from one process by what it drops
            "expert_capacity_factor": None,
            **fields,
        }
    )
    model = get_peft_model(LlamaForCausalLM(sizes), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    return model.to(job.device).train()


def batch(job: Job, step: int, rank: int | None = None) -> dict[str, Tensor]:
    """Rows of one rank, or of all ranks in turn; every row has as many targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(1, 512, (job.ranks * ROWS_PER_RANK, TOKENS), generator=generator)
    rows = slice(None) if rank is None else slice(rank * ROWS_PER_RANK, (rank + 1) * ROWS_PER_RANK)
    ids = ids[rows].to(job.device)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(model: nn.Module, job: Job, step: int, rank: int | None) -> Tensor:
    """The model's loss, balancing included."""
    loss: Tensor = model(**batch(job, step, rank)).loss
    return loss


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie on several ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by their names in the PEFT model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""), parameter


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients; a parameter without one is missing."""
    return {n: full(p.grad).clone() for n, p in trainable(model) if p.grad is not None}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Whole trainable parameters."""
    return {name: full(p.detach()).clone() for name, p in trainable(model)}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW([p for _, p in trainable(model)], lr=RATE)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, job: Job, steps: range, rank: int | None
) -> list[float]:
    """Losses of some steps."""
    losses = []
    for step in steps:
        loss = loss_of(model, job, step, rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def one_process(job: Job, *, joined: bool, steps: int = 0, **fields: Any) -> PeftModel:
    """The reference: gradients of one step, or parameters after some, in this process alone.

    ``joined`` is one forward over the joined batch; else the mean over each rank's own batch, which
    is what averaged gradients are. They differ by the balancing loss only.
    """
    model = build(job, **fields)
    optimizer = optimizer_of(model)
    for step in range(max(steps, 1)):
        for rank in [None] if joined else range(job.ranks):
            loss = loss_of(model, job, step, rank)
            (loss if joined else loss / job.ranks).backward()
        if steps:
            optimizer.step()
            optimizer.zero_grad()
    return model


# The checks ------------------------------------------------------------------------------------


def ddp(model: nn.Module, job: Job) -> DistributedDataParallel:
    """Wrapped as `torchrun` scripts do, without looking for unused parameters."""
    devices = [job.device] if job.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def sharded(model: PeftModel, **options: Any) -> PeftModel:
    """FSDP2: every block is a group, the rest another."""
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


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
    _compare_steps(job, f"DDP: parameters after {STEPS} steps", model, reference)
    _check_reload(job, "DDP", model.module, model.module.state_dict())


def check_fsdp_gradients(job: Job) -> None:
    """FSDP2's gradients are the mean over ranks of one process's."""
    for scope in ("module", "layer", "model"):
        model = sharded(build(job, router_scope=scope))
        loss_of(model, job, 0, job.rank).backward()
        reference = one_process(job, joined=False, router_scope=scope)
        job.compare(f"FSDP2: gradients, scope {scope}", gradients(model), gradients(reference))
    model = build(job)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = sharded(model)
    loss_of(model, job, 0, job.rank).backward()
    reference = gradients(one_process(job, joined=False))
    job.compare("FSDP2: gradients, checkpointing", gradients(model), reference)


def check_fsdp_training(job: Job) -> None:
    """Training, saving and reloading on one process; resuming from a sharded checkpoint."""
    model = sharded(build(job))
    optimizer = optimizer_of(model)
    train(model, optimizer, job, range(3), job.rank)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=job.folder / "dcp")
    train(model, optimizer, job, range(3, STEPS), job.rank)
    reference = one_process(job, joined=False, steps=STEPS)
    _compare_steps(job, f"FSDP2: parameters after {STEPS} steps", model, reference)

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
    _check_reload(job, "FSDP2", model, get_model_state_dict(model, options=options))


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


def _compare_steps(job: Job, name: str, model: nn.Module, reference: nn.Module) -> None:
    """Compare how far parameters moved: the start would hide a wrong step."""
    start = values(build(job))
    moved = {key: value - start[key] for key, value in values(model).items()}
    expected = {key: value - start[key] for key, value in values(reference).items()}
    # AdamW's first steps are the signs of gradients, which rounding turns around where they are 0
    errors = [(moved[key] - expected[key]).norm() / expected[key].norm() for key in expected]
    worst = float(torch.stack([error.cpu() for error in errors]).max())
    passed = moved.keys() == expected.keys() and worst < 0.05
    job.report(name, f"{worst:.1e}", passed=passed)


def _check_reload(job: Job, name: str, model: PeftModel, state: dict[str, Tensor]) -> None:
    """Save on the first rank, load in one process, and compare to the bit."""
    folder = job.folder / name
    whole = {key: full(tensor) for key, tensor in state.items()}
    if job.rank == 0:
        model.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    base = build(job).unload()
    loaded = PeftModel.from_pretrained(base, folder, is_trainable=True)
    found, expected = values(loaded), values(model)
    same = found.keys() == expected.keys() and all(
        torch.equal(found[key].to(job.device), expected[key].to(job.device)) for key in expected
    )
    loaded, trained = loaded.to(job.device).eval(), model.eval()
    with torch.no_grad():
        logits = loaded(**batch(job, 0)).logits
        error = _difference(logits, full(trained(**batch(job, 0)).logits))
    passed = same and error <= (0.0 if name == "DDP" else job.tolerance)
    job.report(f"{name}: saved, reloaded on one process", f"logits {error:.1e}", passed=passed)


CHECKS: tuple[Callable[[Job], None], ...] = (
    check_ddp_gradients,
    check_balance_over_ranks,
    check_sparse,
    check_checkpointing,
    check_ddp_training,
    check_fsdp_gradients,
    check_fsdp_training,
    check_fsdp_bfloat16,
)


# Processes -------------------------------------------------------------------------------------


@contextmanager
def process_group(job: Job) -> Iterator[None]:
    """Join the others by a file, so that no port is needed."""
    backend = "nccl" if job.device.type == "cuda" else "gloo"
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    rendezvous = f"file://{job.folder / 'rendezvous'}"
    dist.init_process_group(backend, init_method=rendezvous, rank=job.rank, world_size=job.ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(rank: int, ranks: int, device: str, folder: str, only: str) -> None:
    """One process: run all checks and leave the results in a file."""
    cuda = device == "cuda"
    job = Job(
        rank,
        ranks,
        torch.device("cuda", rank) if cuda else torch.device("cpu"),
        Path(folder),
        GPU_TOLERANCE if cuda else CPU_TOLERANCE,
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks if cuda else 1))
    torch.set_float32_matmul_precision("highest")
    with process_group(job):
        for check in CHECKS:
            if only not in check.__name__:
                continue
            start = time.perf_counter()
            try:
                check(job)
            except Exception:  # noqa: BLE001 - one broken check must not hide the others
                job.report(check.__name__, traceback.format_exc().strip(), passed=False)
                # the other ranks may wait in a collective: nothing after this can be trusted
                break
            job.results[-1]["seconds"] = round(time.perf_counter() - start, 2)
    (job.folder / f"results-{rank}.json").write_text(json.dumps(job.results), encoding="utf-8")


def main() -> int:
    """Start the processes, wait for them and say whether all checks passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--report", type=Path, help="also write the results here, as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        print(f"{arguments.ranks} GPUs are needed, {torch.cuda.device_count()} found.")
        return 2
    cuda = arguments.device == "cuda"
    machine = torch.cuda.get_device_name(0) if cuda else "CPU"
    print(f"{arguments.ranks} x {machine}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        job = (arguments.ranks, arguments.device, folder, arguments.only)
        mp.start_processes(work, args=job, nprocs=arguments.ranks, start_method="spawn")
        files = sorted(Path(folder).glob("results-*.json"))
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    failed = [entry for rank in results for entry in rank if not entry["passed"]]
    for entry in failed:
        print(f"FAILED: {entry['check']}: {entry['note']}")
    checks = len(results[0])
    print(f"{checks - len([e for e in results[0] if not e['passed']])} of {checks} checks passed")
    if arguments.report:
        summary = {"machine": machine, "torch": torch.__version__, "ranks": results}
        arguments.report.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
