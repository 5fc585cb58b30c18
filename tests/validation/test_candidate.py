"""A checkpoint of any kind becomes one model with its experts as plain adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelora import Router
from moelora.errors import CheckpointError
from moelora.gate_router import GateRouter
from moelora.validation.candidate import Candidate, load_candidate
from moelora.validation.errors import ValidationError
from tests.validation.checkpoints import MODELS, adapters_model, mixture_model, save
from tests.validation.old_checkpoints import old_model, save_old
from tests.validation.tiny import VOCABULARY, save_base, tiny_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def load(folder: Path, base: Path | None) -> Candidate:
    return load_candidate(
        folder,
        base=None if base is None else str(base),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, VOCABULARY, (2, 6))


@pytest.mark.parametrize("kind", [name for name in MODELS if "joined" not in name])
def test_weights_over_the_plain_experts_give_what_the_saved_model_gives(
    kind: str, base: Path, tmp_path: Path
) -> None:
    original = MODELS[kind]()
    original.save_pretrained(tmp_path / "saved")
    candidate = load(tmp_path / "saved", base)
    weights = torch.randn(2, 6, 3)
    with torch.no_grad():
        expected = original(tokens(), routing_weights=weights).logits
        if kind == "adapters alone":
            # nobody says their order, so it is that of their names: french, maths, sql
            weights = weights[..., [1, 2, 0]]
        candidate.model.base_model.set_adapter(candidate.experts)
        found = candidate.model(tokens(), routing_weights=weights).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_come_in_the_order_of_their_router(base: Path, tmp_path: Path) -> None:
    candidate = load(save("adapters with a router", tmp_path / "a"), base)
    assert [name.partition("_")[2] for name in candidate.experts] == ["sql", "french", "maths"]
    assert isinstance(candidate.router, Router)
    assert candidate.model.router is None
    assert (candidate.kind, candidate.mixtures) == ("adapters", [])


def test_adapters_without_a_router_come_in_the_order_of_their_numbers(
    base: Path, tmp_path: Path
) -> None:
    model = adapters_model(router=False)
    model.save_pretrained(tmp_path / "a")
    for old, new in (("sql", "expert_10"), ("french", "expert_9"), ("maths", "expert_1")):
        (tmp_path / "a" / old).rename(tmp_path / "a" / new)
    names = [name.partition("_")[2] for name in load(tmp_path / "a", base).experts]
    assert names == ["expert_1", "expert_9", "expert_10"]


def test_experts_that_joined_one_at_a_time_keep_their_ranks(base: Path, tmp_path: Path) -> None:
    candidate = load(save("experts that joined", tmp_path / "a"), base)
    assert len(candidate.mixtures) == len(candidate.experts) == 3
    assert [candidate.model.peft_config[name].r for name in candidate.experts] == [2, 3, 4]


def test_an_old_checkpoint_brings_its_router_and_its_base(base: Path, tmp_path: Path) -> None:
    folder = save_old(tmp_path / "old", old_model(), config={"base_model_name_or_path": str(base)})
    candidate = load(folder, None)
    assert candidate.kind == "DyLoRA-MoE checkpoint"
    assert candidate.experts == ["expert_0", "expert_1", "expert_2"]
    assert isinstance(candidate.router, GateRouter)


def test_a_trained_output_layer_goes_into_the_base_model(base: Path, tmp_path: Path) -> None:
    model = old_model()
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    candidate = load(save_old(tmp_path / "old", model, layout="pt"), base)
    with torch.no_grad():
        model.set_adapter("expert_1")
        candidate.model.set_adapter("expert_1")
        torch.testing.assert_close(candidate.model(tokens()).logits, model(tokens()).logits)


def _rename(folder: Path) -> None:
    path = folder / "expert_0" / "adapter_model.safetensors"
    tensors = {key.replace("layers.1", "layers.7"): v for key, v in load_file(path).items()}
    save_file(tensors, path)


def _drop_layer(folder: Path) -> None:
    path = folder / "expert_0" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1" not in k}, path)


def _narrow(folder: Path) -> None:
    path = folder / "expert_0" / "adapter_model.safetensors"
    changed = {k: v[:, :5].contiguous() if "lora_A" in k else v for k, v in load_file(path).items()}
    save_file(changed, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename, "for which the base model has no place"),
        (_drop_layer, "holds no tensors for layer 'model.layers.1"),
        (_narrow, "does not fit the base model"),
    ],
)
def test_an_old_expert_that_does_not_fit_the_base_is_refused(
    damage: Any, message: str, base: Path, tmp_path: Path
) -> None:
    folder = save_old(tmp_path / "old", old_model(), layout="flat")
    damage(folder / "peft_adapters")
    with pytest.raises(CheckpointError, match=message):
        load(folder, base)


def test_what_is_no_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "absent", base)
    with pytest.raises(CheckpointError, match="holds no adapter_config.json, no folders that do"):
        load(tmp_path, base)


def test_one_expert_is_nothing_to_mix(base: Path, tmp_path: Path) -> None:
    save_old(tmp_path / "old", old_model(1))
    with pytest.raises(ValidationError, match="holds one expert; there is nothing to mix"):
        load(tmp_path / "old", base)


def test_a_base_model_must_be_named_and_there(base: Path, tmp_path: Path) -> None:
    folder = save("mixture", tmp_path / "a")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValidationError, match="does not say its base model: give it with --base"):
        load(folder, None)
    with pytest.raises(ValidationError, match="The base model .*nowhere cannot be loaded"):
        load(folder, tmp_path / "nowhere")


def test_another_kind_of_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="peft_type 'IA3', must be 'LORA' or 'MOELORA'"):
        load(tmp_path, base)


def test_a_router_over_an_adapter_that_is_gone_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save("adapters with a router", tmp_path / "a")
    (folder / "french").rename(folder / "latin")
    with pytest.raises(CheckpointError, match="routes over 'french', which is not beside it"):
        load(folder, base)


def test_a_damaged_mixture_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save("mixture", tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(folder, base)


def test_mixtures_beside_plain_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    save("adapters alone", tmp_path / "a")
    mixture_model().save_pretrained(tmp_path / "a" / "mixed")
    with pytest.raises(CheckpointError, match="holds mixtures beside plain adapters"):
        load(tmp_path / "a", base)


def test_a_damaged_output_layer_is_refused(base: Path, tmp_path: Path) -> None:
    model = old_model()
    folder = save_old(tmp_path / "old", model, layout="pt")
    for index in range(3):
        path = folder / "peft_adapters" / f"expert_{index}.pt"
        tensors = torch.load(path, weights_only=True)
        torch.save({**tensors, "base_model.model.lm_head.weight": torch.ones(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"trained lm_head, of shape \(3, 3\), does not fit"):
        load(folder, base)
    assert tiny_base().lm_head.weight.shape == (VOCABULARY, 32)
