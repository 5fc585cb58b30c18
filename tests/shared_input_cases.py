"""Whole models whose layers share an input's work; run as a script, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.shared_input_cases

Prints one line per case: its name and how many layers were served by another one's call.
"""

from __future__ import annotations

import copy
import math
import sys
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moelora import MoELoraConfig, prepare_for_inference, record_routing, shared_input
from moelora.ops import packing, rows_together
from moelora.ops.rows_together import RowsTogether
from moelora.routed_layer import RoutedPlan
from moelora.shared_input import may_be_recomputed_alone
from tests.lm import tiny_llama, tiny_t5

#: Before torch 2.8 nobody tells whether a model checkpoints by itself, so in training outside of
#: transformers' checkpointing no layer is served.
TRAINED = not may_be_recomputed_alone()

served = 0


def count_served() -> None:
    """Count the layers that take what another call computed."""
    computed = RoutedPlan.compute
    finished = RoutedPlan.finish

    def compute(*args: Any, **kwargs: Any) -> Any:
        global served  # noqa: PLW0603 - a script
        result = computed(*args, **kwargs)
        served -= 1
        return result

    def finish(*args: Any, **kwargs: Any) -> Any:
        global served  # noqa: PLW0603 - a script
        served += 1
        return finished(*args, **kwargs)

    RoutedPlan.compute, RoutedPlan.finish = compute, finish  # type: ignore[method-assign]


class OwnCheckpoints(nn.Module):
    """Three layers with one input, in a block that the model checkpoints by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.q(x).tanh() * self.k(x) + self.v(x)

        return x + checkpoint(block, x, use_reentrant=False)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Those of all parameters."""
    model.zero_grad()
    model(x.clone().requires_grad_()).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def mixture(base: nn.Module, **changes: Any) -> PeftModel:
    """A mixture on every linear layer, far from its start."""
    settings = {"num_experts": 3, "top_k_experts": 2, "r": 2, "target_modules": "all-linear"}
    model = get_peft_model(base, MoELoraConfig(**{**settings, **changes}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def use(model: nn.Module, backend: str) -> None:
    """Tell every layer its backend."""
    for module in model.modules():
        if "moe_mixtures" in module.__dict__:
            module.__dict__["_moelora_backend"] = backend


def step(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Loss, auxiliary loss, logits and all gradients."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.loss, output.aux_loss, output.logits, *gradients]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error."""
    assert len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=True)
    errors = [float((a - b).norm() / (b.norm() + 1e-9)) for a, b in pairs]
    # max() overlooks NaN
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def check(name: str, ours: list[Tensor], theirs: list[Tensor], *, expected: int | None) -> None:
    """Compare; say how many layers were served."""
    global served  # noqa: PLW0603 - a script
    error = far(ours, theirs)
    is_right = error < 2e-5 and (expected is None or served == expected)
    sys.stdout.write(f"{'ok' if is_right else 'WRONG'} {name}: {error:.1e}, served {served}\n")
    served = 0


def pair(base: nn.Module, **changes: Any) -> tuple[PeftModel, PeftModel]:
    """The same model twice: on the kernels, and on PyTorch's operations."""
    ours = mixture(base, **changes)
    theirs = copy.deepcopy(ours)
    use(ours, "triton")
    use(theirs, "eager")
    return ours.train(), theirs.train()


def prepared_model(ids: Tensor) -> None:
    """A prepared model packs once, and again after each kind of change."""
    global served
    ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
    ours.eval(), theirs.eval()
    packs: list[int] = []
    original = packing.pack

    def pack(*args: Any) -> Any:
        packs.append(1)
        return original(*args)

    packing.pack = pack

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    logits(ours)
    prepared = prepare_for_inference(ours)
    # q with k and v, o, gate with up, down
    for what, packed in (("first", 4), ("kept", 4), ("changed", 5), ("replaced", 6)):
        for model in (ours, theirs):
            layer = model.base_model.model.model.layers[0].self_attn.v_proj
            with torch.no_grad():
                if what == "changed":
                    layer.lora_B["default"].weight.mul_(2)
            if what == "replaced":
                weight = layer.lora_A["default"].weight
                layer.lora_A["default"].weight = nn.Parameter(weight.detach() * 3)
        expected, served = logits(theirs), 0
        check(f"prepared, {what}", [logits(ours)], [expected], expected=3)
        assert len(packs) == packed, (what, len(packs))
    prepared.remove()
    expected, served = logits(theirs), 0
    check("not prepared any more", [logits(ours)], [expected], expected=3)
    assert len(packs) == packed
    packing.pack = original


def count_packing(alone: list[int], together: list[int]) -> None:
    """Enter what is packed alone, and at once."""
    original, at_once = rows_together.pack, RowsTogether.pack

    def pack(*args: Any) -> Any:
        alone.append(1)
        return original(*args)

    def pack_together(self: RowsTogether, *args: Any) -> Any:
        ready = at_once(self, *args)
        together.append(len(ready))
        return ready

    rows_together.pack, RowsTogether.pack = pack, pack_together  # type: ignore[method-assign]


def packed_without_gradients(ids: Tensor) -> None:
    """From the second forward on one launch packs the rows of a portion's layers."""
    alone: list[int] = []
    together: list[int] = []
    count_packing(alone, together)

    def double_a(model: nn.Module) -> None:
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.mul_(2)

    usual = rows_together._PORTION
    # all in one, and each layer (with those of its input) more than one may hold
    for size, portions in ((usual, 1), (1, 4)):
        rows_together._PORTION = size
        ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
        ours.eval(), theirs.eval()
        for what, packed in [
            ("learnt", (4, 0, 0)),
            ("at once", (0, 4, portions)),
            ("changed in place", (0, 4, portions)),
        ]:
            if what == "changed in place":
                double_a(ours), double_a(theirs)
            alone.clear(), together.clear()
            with torch.no_grad():
                expected, found = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
            check(f"lent, {what}, {portions}", [found], [expected], expected=None)
            assert (len(alone), sum(together), len(together)) == packed, (what, together)
    rows_together._PORTION = usual


def packed_at_once(inputs: dict[str, Tensor]) -> None:
    """From the third training forward on, one launch packs the rows of all layers."""
    global served  # noqa: PLW0603 - a script
    ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
    alone: list[int] = []
    together: list[int] = []
    count_packing(alone, together)
    blocks = [model.base_model.model.model.layers[0] for model in (ours, theirs)]
    hooks: list[Any] = []

    def double_a(block: Any, *_: Any) -> None:
        with torch.no_grad():
            block.mlp.down_proj.lora_A["default"].weight.mul_(2)

    def double_data(block: Any) -> None:
        block.mlp.down_proj.lora_A["default"].weight.data.mul_(2)

    def replace_b(block: Any) -> None:
        owner = block.mlp.down_proj.lora_B["default"]
        owner.weight = nn.Parameter(-owner.weight.detach())

    def double_a_later(block: Any) -> None:
        hooks.append(block.self_attn.register_forward_hook(partial(double_a, block)))

    # one of a group packs for all of it
    packs = 4 if TRAINED else 7
    # what is done before a step; layers packed alone in it, layers packed at once
    for what, do, packed in [
        ("learnt", None, (packs, 0)),
        ("at once", None, (0, packs)),
        ("changed in place", double_a, (0, packs)),
        ("through data", double_data, (0, packs)),
        ("replaced", replace_b, (1, packs)),
        ("learnt anew", None, (0, packs)),
        ("changed in the forward", double_a_later, (1, packs)),
    ]:
        for block in blocks if do is not None else ():
            do(block)
        expected = step(theirs, inputs)
        served = 0
        alone.clear(), together.clear()
        check(f"packed, {what}", step(ours, inputs), expected, expected=None)
        assert (len(alone), sum(together)) == packed, (what, len(alone), sum(together))
    for hook in hooks:
        hook.remove()
    for reentrant in (True, False):
        expected = step(theirs, inputs)
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.enable_input_require_grads()
        alone.clear(), together.clear()
        check(f"packed, checkpointing {reentrant}", step(ours, inputs), expected, expected=None)
        # where nothing was served before, another layer packs than in the step before
        assert not TRAINED or (len(alone), sum(together)) == (0, 4)


def main() -> None:
    """All cases."""
    global served  # noqa: PLW0603 - a script
    count_served()
    torch.manual_seed(0)
    ids = torch.randint(1, 61, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}

    ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
    expected = step(theirs, inputs)
    served = 0
    first = step(ours, inputs)
    check("the first forward goes by names", first, expected, expected=3 * TRAINED)
    again = step(ours, inputs)
    check("k, v and up are served", again, expected, expected=3 * TRAINED)
    # as a training goes on that was resumed
    assert all(map(torch.equal, first, again))
    with torch.no_grad(), record_routing(ours) as record:
        logits = ours(**inputs).logits
    served_then, served = served, 0
    with torch.no_grad(), record_routing(theirs) as right:
        expected_logits = theirs(**inputs).logits
    served = served_then
    decided = [routing.routing_weights for routing in record.routing.values()]
    told = [routing.routing_weights for routing in right.routing.values()]
    assert list(record.routing) == list(right.routing)
    check("recorded", [logits, *decided], [expected_logits, *told], expected=3 * TRAINED)
    for model in (ours, theirs):
        model.eval()
    generated = theirs.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False).float()
    served = 0
    again = ours.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False).float()
    check("generation", [again], [generated], expected=6)
    with torch.no_grad():
        expected = [theirs(input_ids=ids).logits]
    served = 0
    with torch.inference_mode():
        check("inference mode", [ours(input_ids=ids).logits], expected, expected=0)

    prepared_model(ids)
    packed_without_gradients(ids)
    packed_at_once(inputs)
    for reentrant in (True, False):
        ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
        expected = step(theirs, inputs)
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.enable_input_require_grads()
        served = 0
        check(f"checkpointing {reentrant}, first", step(ours, inputs), expected, expected=6)
        # every block runs twice
        check(f"checkpointing {reentrant}", step(ours, inputs), expected, expected=6)

    ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
    k_proj = ours.base_model.model.model.layers[0].self_attn.k_proj
    their_k = theirs.base_model.model.model.layers[0].self_attn.k_proj
    step(ours, inputs)
    hooks = [m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)) for m in (k_proj, their_k)]
    expected = step(theirs, inputs)
    served = 0
    check("a hook before k", step(ours, inputs), expected, expected=TRAINED)
    for hook in hooks:
        hook.remove()
    for model in (ours, theirs):
        attention = model.base_model.model.model.layers[0].self_attn.k_proj
        forward = attention.forward
        attention.forward = lambda x, forward=forward: forward(x.clone())
    expected = step(theirs, inputs)
    served = 0
    check("k gets a copy: not taken, computed anew", step(ours, inputs), expected, expected=TRAINED)
    check("and given up", step(ours, inputs), expected, expected=TRAINED)
    assert len(ours.base_model.model._moelora_scope.input_groups) == (2 if TRAINED else 5)

    ours, theirs = pair(OwnCheckpoints(), num_experts=2)
    x = torch.linspace(-1, 1, 60).view(2, 5, 6)
    expected = gradients(theirs, x)
    served = 0
    gradients(ours, x)
    check("a model that checkpoints by itself", gradients(ours, x), expected, expected=0)

    ours, theirs = pair(tiny_t5().float(), num_experts=2, target_modules=["q", "k", "v"])
    t5 = {"input_ids": ids[:, :4], "labels": ids[:, :3].contiguous()}
    expected = step(theirs, t5)
    # where q has another input than k and v, as their names do not tell
    check("an encoder-decoder, first", step(ours, t5), expected, expected=None)
    check("an encoder-decoder", step(ours, t5), expected, expected=None)

    shared_input.SIBLINGS = ()
    ours, theirs = pair(tiny_llama(dtype=torch.float32, num_hidden_layers=1))
    expected = step(theirs, inputs)
    served = 0
    check("without names the first forward watches", step(ours, inputs), expected, expected=0)
    check("and the second knows", step(ours, inputs), expected, expected=3 * TRAINED)


if __name__ == "__main__":
    main()
