"""What is compiled, against the same without compilation; run as a script, a line of JSON per case.

In a process of its own: the test run's type checks would be traced along.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import CompileConfig

import moelora.layer
from moelora.scope import scope_of
from moelora.traced import TracedSums
from tests.lm import (
    explicit_weights,
    gradients_of,
    lora_layers,
    mixture,
    tiny_llama,
    token_ids,
    two_loras,
)

LENGTHS = (7, 9, 12)
Found = dict[str, Any]


def base(**sizes: Any) -> Any:
    return tiny_llama(dtype=torch.float32, num_hidden_layers=1, **sizes)


def compiled(function: Callable[..., Any], *, backend: str = "eager") -> Callable[..., Any]:
    """In one graph, with nothing compiled before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend)
    return result


def far(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def step_of(model: PeftModel, call: Callable[..., Any], **inputs: Any) -> list[Tensor]:
    """Loss and all gradients of a training step."""
    model.zero_grad()
    output = call(**inputs)
    output.loss.backward()
    gradients = [torch.zeros(()) if g is None else g.clone() for g in gradients_of(model)]
    return [output.loss.detach(), output.aux_loss.detach(), *gradients]


def training_inputs(length: int) -> dict[str, Tensor]:
    """A batch with padding."""
    ids = token_ids(length=length)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def over_lengths(run: Callable[[int], tuple[list[Tensor], list[Tensor]]]) -> Found:
    """Errors at all lengths, and the number of graphs after each."""
    errors, graphs = [], []
    for length in LENGTHS:
        errors.append(far(*run(length)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return {"error": max(errors), "graphs": graphs}


def training() -> Found:
    """A step with labels, loss and auxiliary loss, padding and capacity; lengths vary."""
    model = mixture(
        base(),
        target_modules=["q_proj", "down_proj"],
        router_aux_loss_coef=2.0,
        expert_capacity_factor=1.0,
    ).train()
    call = compiled(model, backend="aot_eager")

    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        inputs = training_inputs(length)
        return step_of(model, call, **inputs), step_of(model, model, **inputs)

    return over_lengths(run)


def unpadded() -> Found:
    """A training forward without a mask; lengths vary."""
    model = mixture(base(), target_modules=["down_proj"], expert_capacity_factor=1.0).train()
    call = compiled(model)

    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        ids = token_ids(length=length)
        losses = [function(input_ids=ids, labels=ids).loss.detach() for function in (call, model)]
        return losses[:1], losses[1:]

    return over_lengths(run)


def evaluation(**fields: Any) -> Found:
    """A forward without gradients; lengths vary."""
    model = mixture(base(), target_modules=["q_proj", "down_proj"], **fields).eval()
    call = compiled(model)

    @torch.no_grad()
    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        ids = token_ids(length=length)
        return [call(input_ids=ids).logits], [model(input_ids=ids).logits]

    return over_lengths(run)


def explicit() -> Found:
    """Plain adapters under the caller's weights, with gradients; lengths vary."""
    model = two_loras(base()).train()
    call = compiled(model)

    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        ids, weights = token_ids(length=length), explicit_weights(length=length).float()
        results = []
        for function in (call, model):
            model.zero_grad()
            output = function(input_ids=ids, labels=ids, routing_weights=weights)
            output.loss.backward()
            results.append([output.loss.detach(), *(g.clone() for g in gradients_of(model))])
        return results[0], results[1]

    return over_lengths(run)


def one_layer() -> Found:
    """An adapted layer alone."""
    layer = next(iter(lora_layers(mixture(base()).eval()).values()))
    call = compiled(layer)

    @torch.no_grad()
    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        x = torch.randn(2, length, 16)
        return [call(x)], [layer(x)]

    return over_lengths(run)


def wide_parameters() -> Found:
    """Float32 adapters over a bfloat16 base compute in bfloat16, as on a GPU."""
    narrows = moelora.layer.narrows
    model = mixture(tiny_llama(dtype=torch.bfloat16, num_hidden_layers=1)).eval()
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == torch.float32
    seen = []

    def as_on_a_gpu(_layer: Any, _adapter: str, x: Tensor) -> bool:
        seen.append(x.dtype)
        return True

    ids = token_ids()
    exact = model.get_base_model()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        moelora.layer.narrows = as_on_a_gpu
        try:
            narrow = compiled(model)(input_ids=ids).logits
        finally:
            moelora.layer.narrows = narrows
        expected = exact.double()(input_ids=ids).logits
    ratio = far([narrow], [expected]) / far([plain], [expected])
    return {"error": ratio, "graphs": [1], "seen": bool(seen)}


def generation() -> Found:
    """The static cache's compiled decoding, as transformers does by itself on a GPU."""
    model = mixture(base(), target_modules=["q_proj"]).eval()
    ids = token_ids(rows=1)
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=ids, **told)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    found = model.generate(input_ids=ids, cache_implementation="static", compile_config=how, **told)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"error": float(not torch.equal(found, expected)), "graphs": [graphs]}


# By Triton's kernels, which a process with TRITON_INTERPRET=1 runs on the CPU -------------------


def on_kernels(model: PeftModel) -> PeftModel:
    """The model, its layers told to run the kernels."""
    for layer in lora_layers(model).values():
        layer.__dict__["_moelora_backend"] = "triton"
    return model


def counting(seen: list[int]) -> Callable[..., Any]:
    """A compiler that notes how many layers of each graph are one operator."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        seen.append(sum(name.startswith("moelora.routed_linears") for name in names))
        compiler: Any = torch._dynamo.lookup_backend("aot_eager")
        return compiler(graph, inputs)

    return compile_graph


def step_on_kernels(prepare: Callable[[PeftModel], None] | None = None, **fields: Any) -> Found:
    """A training step at all lengths, by operators and without compilation."""
    model = mixture(
        base(),
        router_aux_loss_coef=2.0,
        **{"target_modules": ["q_proj", "down_proj"], "expert_capacity_factor": 1.0, **fields},
    )
    on_kernels(model.train())
    if prepare is not None:
        prepare(model)
    operators: list[int] = []
    call = compiled(model, backend=counting(operators))

    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        inputs = training_inputs(length)
        results = []
        for function in (call, model):
            # dropout
            torch.manual_seed(length)
            results.append(step_of(model, function, **inputs))
        return results[0], results[1]

    return {**over_lengths(run), "operators": operators}


def beside_bases(model: PeftModel) -> None:
    """Let the bases compute themselves."""
    for layer in lora_layers(model).values():
        layer.base_layer.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def tokens_on_kernels(prepare: Callable[[PeftModel], None] | None = None, **fields: Any) -> Found:
    """A forward without gradients at all lengths, by operators and without compilation."""
    model = mixture(base(), **{"target_modules": ["q_proj", "down_proj"], **fields})
    on_kernels(model.eval())
    if prepare is not None:
        prepare(model)
    operators: list[int] = []
    call = compiled(model, backend=counting(operators))

    @torch.no_grad()
    def run(length: int) -> tuple[list[Tensor], list[Tensor]]:
        ids = token_ids(length=length)
        return [call(input_ids=ids).logits], [model(input_ids=ids).logits]

    return {**over_lengths(run), "operators": operators}


def double_input(_layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
    """A hook that changes what a layer has read."""
    inputs[0].mul_(2)


def change_inputs(model: PeftModel) -> None:
    """Let an input be changed in place behind the first of the layers that read it."""
    query = next(layer for name, layer in lora_layers(model).items() if "q_proj" in name)
    query.register_forward_hook(double_input)


def observed_on_kernels() -> Found:
    """What the Trainer's callback is told by operators, and by PyTorch's operations."""
    found = []
    for runs_kernels in (True, False):
        torch.manual_seed(0)
        model = mixture(base(), target_modules=["q_proj", "down_proj"]).train()
        if runs_kernels:
            on_kernels(model)
        scope = scope_of(model.get_base_model())
        assert scope is not None
        sums = scope.traced = TracedSums(model.get_base_model())
        operators: list[int] = []
        call = compiled(model, backend=counting(operators))
        step_of(model, call, **training_inputs(9))
        assert operators == [2 * runs_kernels]
        found.append([sums.sums, sums.aux_loss])
    return {"error": far(found[0], found[1]), "graphs": [1], "operators": [2]}


def on_gpu(mode: str) -> None:
    """A training step in float32 on a GPU; writes the error of loss and gradients."""
    warnings.simplefilter("ignore")
    model = mixture(tiny_llama(dtype=torch.float32), router_aux_loss_coef=2.0).cuda().train()
    inputs = {name: tensor.cuda() for name, tensor in training_inputs(9).items()}
    call = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        # the third run replays what the second recorded
        torch.compiler.cudagraph_mark_step_begin()
        found = step_of(model, call, **inputs)
    error = far(found, step_of(model, model, **inputs))
    sys.stdout.write(json.dumps({"error": error}) + "\n")


CASES: dict[str, Callable[[], Found]] = {
    "training": training,
    "unpadded": unpadded,
    "evaluation": evaluation,
    "explicit": explicit,
    "one_layer": one_layer,
    "wide_parameters": wide_parameters,
    "generation": generation,
}

#: So many ranks for each chosen expert are computed sparsely.
MANY = {"num_experts": 10, "top_k_experts": 1, "r": 32}

ON_KERNELS: dict[str, Callable[[], Found]] = {
    "sparse step": lambda: step_on_kernels(**MANY),
    "step beside bases": lambda: step_on_kernels(beside_bases, expert_capacity_factor=None),
    "tokens": tokens_on_kernels,
    "step with dropout": lambda: step_on_kernels(lora_dropout=0.3),
    # layers that read one input are one operator
    "together": lambda: tokens_on_kernels(target_modules="all-linear"),
    "changed": lambda: tokens_on_kernels(
        change_inputs, target_modules=["q_proj", "k_proj", "v_proj"]
    ),
    "observed": observed_on_kernels,
}


def main(cases: dict[str, Callable[[], Found]] = CASES) -> None:
    """Write a line for each case."""
    warnings.simplefilter("ignore")
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            found = case()
        except Exception as error:  # noqa: BLE001 - the test shows it
            found = {"failed": f"{type(error).__name__}: {error}"[:3000]}
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        sys.stdout.write(f"CASE {json.dumps({'case': name, 'breaks': breaks, **found})}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
