"""What a cell of the architecture table claims, as functions that raise where it is false."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora import MoELoraConfig, UnsupportedLayerError
from tests.architecture_table.bases import Architecture
from tests.lm import lora_layers, router_parameters
from tests.tolerances import assert_close, assert_equal

STEPS, NEW = 3, 5
FILES = ["adapter_config.json", "adapter_model.safetensors", "router.safetensors"]


@dataclass(frozen=True)
class Column:
    """A column: its title, what its cells say, and the test of a cell."""

    title: str
    says: Callable[[Architecture], str]
    check: Callable[[Architecture, Path], None]


def mixture_of(architecture: Architecture, **fields: Any) -> PeftModel:
    """A mixture over all linear layers, with the defaults of ``MoELoraConfig``."""
    base = architecture.make()
    torch.manual_seed(1)
    config = MoELoraConfig(
        **{
            "r": 2,
            "num_experts": 4,
            "target_modules": "all-linear",
            "task_type": architecture.task,
            **architecture.fields,
            **fields,
        }
    )
    return get_peft_model(base, config)


def loss_of(architecture: Architecture, model: nn.Module) -> Tensor:
    """The model's own loss, or the cross entropy of one that has none."""
    batch = architecture.batch()
    if hasattr(model.get_base_model(), "config"):
        loss: Tensor = model(**batch).loss
        return loss
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch), labels)


def trained(architecture: Architecture, **fields: Any) -> tuple[PeftModel, list[float], set[str]]:
    """A mixture after three steps, the loss before each and after, and the routers that learn."""
    model = mixture_of(architecture, **fields).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    losses, learning = [], set()
    for _ in range(STEPS):
        # dropout of the base, where it has any, is the same at every step
        torch.manual_seed(2)
        loss = loss_of(architecture, model)
        losses.append(loss.item())
        loss.backward()
        learning |= {
            name
            for name, p in router_parameters(model).items()
            if p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any())
        }
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(2)
    losses.append(loss_of(architecture, model).item())
    return model, losses, learning


def output_of(architecture: Architecture, model: nn.Module) -> Tensor:
    """What the model computes for the batch, without its loss."""
    inputs = architecture.batch()
    labels = inputs.pop("labels")
    if architecture.is_encoder_decoder:
        inputs["decoder_input_ids"] = labels
    with torch.no_grad():
        output = model.eval()(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def generated(architecture: Architecture, model: nn.Module, **options: Any) -> Tensor:
    """Greedy continuation of the batch's inputs."""
    inputs = architecture.batch()
    del inputs["labels"]
    if "input_features" in inputs:
        # Whisper's own generate is about languages and time stamps; this is everyone's
        options = {"decoder_input_ids": torch.zeros(inputs["input_features"].shape[0], 1).long()}
    found: Tensor = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return found


def step_by_step(architecture: Architecture, model: nn.Module) -> Tensor:
    """The same without a cache and without ``generate``."""
    inputs = architecture.batch()
    rows = len(inputs.pop("labels"))
    name = "decoder_input_ids" if architecture.is_encoder_decoder else "input_ids"
    ids = inputs.pop(name, torch.zeros(rows, 1, dtype=torch.long))
    for _ in range(NEW):
        positions = {}
        if name == "input_ids":
            grown = F.pad(
                inputs["attention_mask"],
                (0, ids.shape[1] - inputs["attention_mask"].shape[1]),
                value=1,
            )
            inputs["attention_mask"] = grown
            positions["position_ids"] = (grown.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**{name: ids}, **inputs, **positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


# The columns -----------------------------------------------------------------------------------


def linear_layers(architecture: Architecture) -> list[str]:
    """The layers that ``all-linear`` has to adapt: all but the head."""
    base = architecture.make()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not architecture.generates:
        # a head that is trained and saved whole
        head = getattr(base, "classifier", None)
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def check_all_linear(architecture: Architecture, _folder: Path) -> None:
    model = mixture_of(architecture)
    adapted = lora_layers(model.get_base_model())
    assert sorted(adapted) == sorted(linear_layers(architecture))
    assert all("default" in layer.lora_router for layer in adapted.values())
    assert_close(output_of(architecture, model), output_of_base(architecture))


def output_of_base(architecture: Architecture) -> Tensor:
    """What the base alone computes; PEFT's initialisation of a saved head is a copy of it."""
    return output_of(architecture, architecture.make())


def check_train(architecture: Architecture, _folder: Path) -> None:
    model, losses, learning = trained(architecture)
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]
    assert learning == set(router_parameters(model))
    before = mixture_of(architecture).get_base_model().state_dict()
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            assert_equal(tensor, before[name])


def check_save(architecture: Architecture, folder: Path) -> None:
    model, _, _ = trained(architecture)
    model.save_pretrained(folder)
    assert [name for name in FILES if not (folder / name).is_file()] == []
    config = json.loads((folder / FILES[0]).read_text())
    assert (config["peft_type"], config["num_experts"]) == ("MOELORA", 4)
    with safe_open(folder / FILES[1], framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = get_peft_model_state_dict(model)
    assert sorted(saved) == sorted(state)
    for name, tensor in saved.items():
        assert_equal(tensor, state[name])


def reloaded(architecture: Architecture, model: PeftModel, folder: Path) -> PeftModel:
    """``model``, saved and loaded into a base that nothing has touched."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(architecture.make(), folder)


def check_reload(architecture: Architecture, folder: Path) -> None:
    model, _, _ = trained(architecture)
    fresh = reloaded(architecture, model, folder)
    assert not torch.equal(output_of(architecture, model), output_of_base(architecture))
    assert_equal(output_of(architecture, fresh), output_of(architecture, model))


def check_generate(architecture: Architecture, folder: Path) -> None:
    model, _, _ = trained(architecture)
    fresh = reloaded(architecture, model, folder).eval()
    if architecture.generates:
        expected = step_by_step(architecture, model.eval())
        for one in (model, fresh):
            # Whisper leaves the first token of its decoder out
            assert_equal(generated(architecture, one)[:, -NEW:], expected[:, -NEW:])
        return
    expected = output_of(architecture, model)
    rows = copy.copy(architecture.batch())
    del rows["labels"]
    for row in range(len(expected)):
        with torch.no_grad():
            output = fresh(**{name: value[row : row + 1] for name, value in rows.items()})
        logits = output if isinstance(output, Tensor) else output.logits
        assert_close(logits, expected[row : row + 1])


def check_scope(architecture: Architecture, folder: Path, *, scope: str) -> None:
    refusal = architecture.scopes[scope]
    if refusal is None:
        left_out = architecture.beside_blocks
        model, losses, learning = trained(
            architecture, router_scope=scope, exclude_modules=left_out
        )
        assert losses[-1] < losses[0]
        assert learning == set(router_parameters(model))
        fresh = reloaded(architecture, model, folder)
        assert_equal(output_of(architecture, fresh), output_of(architecture, model))
        return
    try:
        mixture_of(architecture, router_scope=scope)
    except UnsupportedLayerError as error:
        assert refusal in str(error)  # noqa: PT017 - the reason is a cell of the table
        return
    raise AssertionError(f"router_scope={scope!r} was not refused")


def _says_scope(architecture: Architecture, scope: str) -> str:
    refusal = architecture.scopes[scope]
    if refusal is not None:
        return f"refused: “… {refusal} …”"
    left_out = architecture.beside_blocks
    return f"works with `exclude_modules={left_out}`" if left_out else "works"


COLUMNS = (
    Column(
        '`"all-linear"`',
        lambda architecture: f"{len(linear_layers(architecture))} layers, each with a router",
        check_all_linear,
    ),
    Column("train", lambda _: "works: the loss falls, every router learns", check_train),
    Column("save", lambda _: "works", check_save),
    Column("reload", lambda _: "works: bit-equal in a fresh base", check_reload),
    Column(
        "generate or predict",
        lambda architecture: (
            "generates: as an uncached loop"
            if architecture.generates
            else "predicts: rows as they do alone"
        ),
        check_generate,
    ),
    *(
        Column(
            f'`router_scope="{scope}"`',
            partial(_says_scope, scope=scope),
            partial(check_scope, scope=scope),
        )
        for scope in ("layer", "model")
    ),
)
