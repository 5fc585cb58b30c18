"""One validation from beginning to end: load, compare, measure, write."""

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from moelora.demo.workspace import whole_folder
from moelora.gate_router import GateRouter
from moelora.validation.agreement import TOLERANCES, Agreement, Comparison
from moelora.validation.candidate import Candidate, load_candidate, lora_layers
from moelora.validation.errors import ValidationError
from moelora.validation.inputs import batches_of, routing_over_time, tokens_of, weights_for
from moelora.validation.markdown import to_markdown
from moelora.validation.options import RESULT_FILES, ValidationOptions, check_out
from moelora.validation.page import to_html
from moelora.validation.results import Report, Speed, to_json, usage_of
from moelora.validation.speed import MEMORY_METHODS, measure
from moelora.validation.stacking import stack_experts, why_not_stackable
from moelora.validation.ways import Batch, activate, all_ways, seeded_weights

_PACKAGES = ("moelora", "torch", "transformers", "peft")
_MIXTURE = "validation_mixture"


def validate(
    checkpoint: Path, options: ValidationOptions, *, show_progress: bool = False
) -> Report:
    """Validate a checkpoint and write the report as Markdown, JSON and HTML.

    Args:
        checkpoint: a folder that moelora, PEFT or DyLoRA-MoE's own code saved.
        options: how.
        show_progress: a bar on standard error.

    Raises:
        CheckpointError: if the checkpoint is damaged, refused, or does not fit the base model.
        ValidationError: if an argument does not fit.

    Example:
        >>> validate(Path("experts"), ValidationOptions(Path("report")))  # doctest: +SKIP
    """
    check_out(options.out)
    device = _device(options.device)
    torch.manual_seed(options.seed)
    candidate = load_candidate(
        checkpoint,
        base=options.base,
        dtype=getattr(torch, options.dtype),
        device=device,
        lora_alpha=options.lora_alpha,
    )
    with tqdm(total=1, unit="call", disable=not show_progress, leave=False) as bar:
        report = _examine(checkpoint, candidate, options, bar)
    with whole_folder(options.out) as folder:
        texts = (to_json(report), to_markdown(report), to_html(report))
        for name, text in zip(RESULT_FILES, texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
    return report


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValidationError(f"--device {name} is not available: {reason}") from error
    return device


def _examine(
    checkpoint: Path, candidate: Candidate, options: ValidationOptions, bar: "tqdm[Any]"
) -> Report:
    need = options.batch * options.seq * options.batches
    tokens, source = tokens_of(candidate, text=options.text, seed=options.seed, number=need)
    batches = list(
        batches_of(tokens, rows=options.batch, length=options.seq, number=options.batches)
    )
    reason = why_not_stackable(candidate.model, candidate.experts)
    notes = list(candidate.notes)
    if reason is not None:
        notes.append(f"The experts cannot be stacked to one mixture: {reason}.")
    weights, weights_from = weights_for(candidate, batches[0], seed=options.seed)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = TOLERANCES[getattr(torch, options.dtype)]
    dense = seeded_weights(
        options.batch, options.seq, len(candidate.experts), seed=options.seed, device=weights.device
    )
    # a scaling such as 4/3 is rounded to the weights' dtype
    dtype = torch.promote_types(getattr(torch, options.dtype), torch.float32)
    agreement = Agreement(
        candidate,
        batches[0],
        weights.to(dtype),
        dense.to(dtype),
        tolerance=tolerance,
        stackable=reason is None,
    )
    bar.total = len(agreement.checks) + 1 + len(options.experts) * _calls(options)
    comparisons: list[Comparison] = []
    for check in agreement.checks:
        bar.set_description("comparing")
        comparisons += check()
        bar.update()
    bar.set_description("routing")
    usage = usage_of(routing_over_time(candidate, batches))
    bar.update()
    settings = {
        "dtype": options.dtype,
        "device": _device_name(options.device),
        "batch": options.batch,
        "seq": options.seq,
        "repeats": options.repeats,
        "warmup": options.warmup,
        "tolerance": tolerance,
        "input": source,
        "weights of the comparisons": weights_from,
        "seed": options.seed,
    }
    run = _SpeedRun(candidate, batches[0], options, reason is None, bar)
    speed = [run.at(number) for number in options.experts]
    return Report(
        settings=settings,
        versions=_versions(),
        checkpoint=_described(checkpoint, candidate),
        comparisons=comparisons,
        speed=speed,
        usage=usage,
        memory_method=MEMORY_METHODS.get(torch.device(options.device).type),
        notes=[*notes, *run.notes()],
    )


def _calls(options: ValidationOptions) -> int:
    """Timed calls for one number of experts: six ways forward, five in training."""
    return 11 * (options.warmup + options.repeats)


def _device_name(name: str) -> str:
    device = torch.device(name)
    if device.type == "cuda":
        return f"{name} ({torch.cuda.get_device_name(device)})"
    return f"{name} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    from moelora import __version__

    installed = {"moelora": __version__, "python": platform.python_version()}
    for package in _PACKAGES[1:]:
        installed[package] = metadata.version(package)
    return installed


def _described(checkpoint: Path, candidate: Candidate) -> dict[str, Any]:
    model = candidate.model
    ranks = sorted(
        {
            layer.r[name]
            for layer in lora_layers(model).values()
            for name in candidate.experts
            if name in layer.r
        }
    )
    routed = "in its layers" if candidate.mixtures else None
    if candidate.router is not None:
        routed = f"attached {type(candidate.router).__name__}"
    return {
        "checkpoint": checkpoint.resolve().name,
        "kind": candidate.kind,
        "base model": model.get_base_model().config._name_or_path,
        "number of experts": len(candidate.experts),
        "ranks": ranks,
        "adapted layers": len(lora_layers(model)),
        "router": routed or "none",
    }


# Speed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SpeedRun:
    """What measuring needs, whatever the number of experts."""

    candidate: Candidate
    batch: Batch
    options: ValidationOptions
    stackable: bool
    bar: "tqdm[Any]"

    def notes(self) -> list[str]:
        """What a person should know of the measured ways."""
        own, notes = len(self.candidate.experts), []
        if any(number > own for number in self.options.experts):
            notes.append(
                f"The checkpoint has {own} experts; beyond that, copies of them were measured: "
                "speed depends on shapes, not on values."
            )
        if self.stackable and not self.candidate.mixtures and self.options.experts:
            notes.append(
                "The single pass was measured with newly drawn routers in each layer: the "
                "checkpoint has none there."
            )
        return notes

    def at(self, number: int) -> Speed:
        """Measure every way at one number of experts."""
        candidate, model = self.candidate, self.candidate.model
        self.bar.set_postfix(experts=number)
        experts = list(candidate.experts[:number])
        copies = _add_copies(candidate, number - len(experts))
        experts += copies
        mixtures = list(candidate.mixtures) if number == len(candidate.experts) else []
        made = copies
        if self.stackable and not mixtures:
            stack_experts(model, experts, _MIXTURE)
            mixtures, made = [_MIXTURE], [*copies, _MIXTURE]
        try:
            measured = measure(
                model,
                all_ways(model, experts, router=_router_for(candidate, number), mixtures=mixtures),
                self.batch,
                warmup=self.options.warmup,
                repeats=self.options.repeats,
                tick=lambda label: _tick(self.bar, label),
            )
        finally:
            activate(model, candidate.experts)
            for name in made:
                model.delete_adapter(name)
        return Speed(number, measured)


def _tick(bar: "tqdm[Any]", label: str) -> None:
    bar.set_description(label)
    bar.update()


def _add_copies(candidate: Candidate, number: int) -> list[str]:
    """Copies of the experts, one after the other, under names of their own."""
    model, names = candidate.model, []
    for index in range(max(0, number)):
        source, name = candidate.experts[index % len(candidate.experts)], f"validation_copy{index}"
        model.add_adapter(name, model.peft_config[source])
        with torch.no_grad():
            for layer in lora_layers(model).values():
                for holder in layer.adapter_layer_names:
                    _copy(getattr(layer, holder), source, name)
        names.append(name)
    return names


def _copy(holder: Any, source: str, name: str) -> None:
    if source in holder and name in holder and isinstance(holder[source], nn.Module):
        holder[name].load_state_dict(holder[source].state_dict())


def _router_for(candidate: Candidate, number: int) -> nn.Module:
    """The checkpoint's router if it routes over that many, else a linear gate of that size."""
    router = candidate.router
    if router is not None and number == len(candidate.experts):
        return router
    width = int(candidate.model.get_base_model().config.hidden_size)
    return GateRouter(width, number, top_k=1).to(candidate.device).eval()
