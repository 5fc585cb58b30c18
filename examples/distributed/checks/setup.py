"""What the checks share: a process's job, the model, its batches, and the one-process reference."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
        self._keep(name, note, "ok" if passed else "FAIL")

    def skip(self, name: str, reason: str) -> None:
        """Say that a check was not made, and why."""
        self._keep(name, reason, "skip")

    def _keep(self, name: str, note: str, result: str) -> None:
        self.results.append({"check": name, "result": result, "note": note})
        if self.rank == 0:
            print(f"{result:<4}  {name:<58} {note}", flush=True)

    def compare(self, name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Compare tensors by name, on every rank alike."""
        missing = found.keys() ^ expected.keys()
        error = max(
            (difference(found[key], expected[key]) for key in found.keys() & expected.keys()),
            default=0.0,
        )
        passed = not missing and bool(found) and error <= self.tolerance
        note = f"{error:.1e}" + (f", {len(missing)} missing" if missing else "")
        self.report(name, note, passed=passed)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that was expected."""
    scale = expected.float().abs().max().clamp(min=1e-12)
    return float((found.float().to(scale.device) - expected.float()).abs().max() / scale)


def base(job: Job) -> LlamaForCausalLM:
    """A small Llama, the same on every rank, on the CPU."""
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
    return LlamaForCausalLM(sizes)


def adapt(model: nn.Module, **fields: Any) -> PeftModel:
    """A mixture over a base, its experts and routers far from their initial values."""
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
    adapted = get_peft_model(model, config)
    perturb(adapted)
    return adapted


def perturb(model: nn.Module) -> None:
    """Draw all adapter tensors anew, on the CPU's generator, whichever device they are on."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build(job: Job, **fields: Any) -> PeftModel:
    """The same mixture on every rank, on the rank's device."""
    return adapt(base(job), **fields).to(job.device).train()


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


def compare_steps(job: Job, name: str, model: nn.Module, reference: nn.Module) -> None:
    """Compare how far parameters moved: the start would hide a wrong step."""
    start = values(build(job))
    moved = {key: value - start[key] for key, value in values(model).items()}
    expected = {key: value - start[key] for key, value in values(reference).items()}
    # AdamW's first steps are the signs of gradients, which rounding turns around where they are 0
    errors = [(moved[key] - expected[key]).norm() / expected[key].norm() for key in expected]
    worst = float(torch.stack([error.cpu() for error in errors]).max())
    passed = moved.keys() == expected.keys() and worst < 0.05
    job.report(name, f"{worst:.1e}", passed=passed)


def check_reload(job: Job, name: str, model: PeftModel, state: dict[str, Tensor]) -> None:
    """Save on the first rank, load in one process, and compare to the bit."""
    folder = job.folder / name
    whole = {key: full(tensor) for key, tensor in state.items()}
    if job.rank == 0:
        model.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    loaded = PeftModel.from_pretrained(base(job), folder, is_trainable=True)
    found, expected = values(loaded), values(model)
    same = found.keys() == expected.keys() and all(
        torch.equal(found[key].to(job.device), expected[key].to(job.device)) for key in expected
    )
    loaded, trained = loaded.to(job.device).eval(), model.eval()
    with torch.no_grad():
        logits = loaded(**batch(job, 0)).logits
        error = difference(logits, full(trained(**batch(job, 0)).logits))
    passed = same and error <= (0.0 if name == "DDP" else job.tolerance)
    job.report(f"{name}: saved, reloaded on one process", f"logits {error:.1e}", passed=passed)
