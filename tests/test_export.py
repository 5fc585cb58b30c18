"""Exporting: an expert leaves as a plain LoRA that does the same without moelora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from moelora import ConfigError, MoELoraConfig, Router, compose, export_expert
from tests.adapters import save_lora
from tests.lm import mixture, perturb, run_python, tiny_llama, token_ids, two_loras
from tests.models import LAYER_KINDS, Block, gpt2_config, unchecked_types
from tests.tolerances import assert_close, assert_equal

SCOPES = ["module", "layer", "model"]


def _one_hot(index: int, number: int) -> Tensor:
    weights = torch.zeros(number, dtype=torch.float64)
    weights[index] = 1
    return weights


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(gpt2_config()).to(torch.float64)


def _gpt2_mixture(**fields: Any) -> PeftModel:
    config = MoELoraConfig(
        r=3,
        lora_alpha=4,
        num_experts=2,
        target_modules=["c_attn", "c_fc", "wte"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
        **fields,
    )
    model = get_peft_model(_gpt2(), config)
    perturb(model)
    return model


# what a process without moelora does with exported folders
PLAIN_PROCESS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

for root, number in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    ids = load_file(root + "/ids.safetensors")["ids"]
    outputs = {}
    for index in range(number):
        base = AutoModelForCausalLM.from_pretrained(root + "/base", dtype=torch.float64)
        folder = f"{root}/expert-{index}"
        assert type(PeftConfig.from_pretrained(folder)) is LoraConfig
        model = PeftModel.from_pretrained(base, folder).eval()
        outputs[str(index)] = model(ids).logits.detach()
        outputs[f"merged {index}"] = model.merge_and_unload()(ids).logits.detach()
    save_file(outputs, root + "/outputs.safetensors")
assert "moelora" not in sys.modules
"""


MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (tiny_llama, mixture),
    "gpt2": (_gpt2, _gpt2_mixture),
}


@pytest.fixture(scope="module")
def in_plain_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What the exported experts of each model give in one process without moelora."""
    folders, arguments = {}, []
    for name, (base, make) in MODELS.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        model = make().eval()
        number = model.peft_config["default"].num_experts
        base().save_pretrained(folder / "base")
        model.save_pretrained(folder / "mixture", save_embedding_layers=False)
        save_file({"ids": token_ids() % 30}, folder / "ids.safetensors")
        for index in range(number):
            export_expert(folder / "mixture", folder / f"expert-{index}", expert=index)
        arguments += [folder, number]
    finished = run_python(PLAIN_PROCESS, *arguments)
    assert finished.returncode == 0, finished.stderr
    return {name: load_file(folder / "outputs.safetensors") for name, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_plain_peft_without_moelora_gives_what_the_mixture_gives_with_one_hot_weights(
    name: str, in_plain_peft: dict[str, dict[str, Tensor]]
) -> None:
    model, outputs = MODELS[name][1]().eval(), in_plain_peft[name]
    number = model.peft_config["default"].num_experts
    assert len(outputs) == 2 * number
    for index in range(number):
        expected = model(token_ids() % 30, routing_weights=_one_hot(index, number)).logits
        torch.testing.assert_close(outputs[str(index)], expected, rtol=1e-12, atol=1e-13)
        # merging into GPT-2's embedding would change its tied head too, with plain PEFT as well
        if name == "llama":
            assert_close(outputs[f"merged {index}"], expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "fixed"])
@pytest.mark.parametrize("hidden", [None, 4])
def test_experts_leave_mixtures_of_every_router(
    scope: Any, router_type: Any, hidden: int | None, tmp_path: Path
) -> None:
    model = mixture(router_scope=scope, router_type=router_type, router_hidden_size=hidden).eval()
    model.save_pretrained(tmp_path / "mixture")
    for source, name in ((tmp_path / "mixture", "a"), (model, "b"), (model.base_model, "c")):
        export_expert(source, tmp_path / name, expert=1)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    expected = model(token_ids(), routing_weights=_one_hot(1, 3)).logits
    assert_close(plain(token_ids()).logits, expected)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc"]
    assert all(".lora_router." not in key for key in files[0])
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        assert_equal([other[key] for key in files[0]], list(files[0].values()))


@pytest.mark.parametrize("kind", [n for n in LAYER_KINDS if n != "Conv2d with groups"])
def test_an_expert_of_every_layer_kind_comes_back_from_compose_and_export(
    kind: str, tmp_path: Path
) -> None:
    base = Block(LAYER_KINDS[kind].make()).double()
    state = base.state_dict()
    x = LAYER_KINDS[kind].draw(2, 3)
    x = x.double() if x.is_floating_point() else x
    outputs = []
    for index, r in enumerate((2, 3)):
        fresh = Block(LAYER_KINDS[kind].make()).double()
        fresh.load_state_dict(state)
        config = LoraConfig(r=r, lora_alpha=4, target_modules=["layer"])
        model = get_peft_model(fresh, config)
        perturb(model, seed=index)
        model.save_pretrained(tmp_path / str(index), save_embedding_layers=False)
        outputs.append(model.eval()(x))
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    for index, r in enumerate((2, 3)):
        made = export_expert(tmp_path / "out", tmp_path / f"back{index}", expert=index)
        assert made.r == r
        fresh = Block(LAYER_KINDS[kind].make()).double()
        fresh.load_state_dict(state)
        plain = PeftModel.from_pretrained(fresh, tmp_path / f"back{index}").eval()
        assert_close(plain(x), outputs[index])


def test_composing_and_exporting_gives_the_adapter_back_to_the_bit(tmp_path: Path) -> None:
    names = ["sql", "french"]
    save_lora(tmp_path / "sql", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    save_lora(tmp_path / "french", seed=1, r=3, lora_alpha=12, target_modules=["q_proj"])
    compose([tmp_path / name for name in names], tmp_path / "out")
    for name in names:
        export_expert(tmp_path / "out", tmp_path / f"{name}-back", expert=name)
        before, after = (
            load_file(tmp_path / folder / "adapter_model.safetensors")
            for folder in (name, f"{name}-back")
        )
        assert before.keys() == after.keys()
        a = [key for key in before if ".lora_A." in key]
        assert_equal([after[key] for key in a], [before[key] for key in a])
        configs = [LoraConfig.from_pretrained(tmp_path / f) for f in (name, f"{name}-back")]
        scalings = [config.lora_alpha / config.r for config in configs]
        b = [key for key in before if ".lora_B." in key]
        assert_equal(
            [after[key] * scalings[1] for key in b], [before[key] * scalings[0] for key in b]
        )
        assert configs[0].target_modules == configs[1].target_modules
        assert configs[0].r == configs[1].r


def test_the_config_is_as_plain_as_other_programs_want_it(tmp_path: Path) -> None:
    for index, fields in enumerate(
        [
            {"r": 3, "alpha_pattern": {"v_proj": 7}, "use_rslora": True},
            {"r": 2, "rank_pattern": {"q_proj": 4}, "init_lora_weights": "gaussian"},
        ]
    ):
        save_lora(tmp_path / str(index), seed=index, **fields)
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    export_expert(tmp_path / "out", tmp_path / "plain", expert=0)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert not any(config[name] for name in ("use_rslora", "use_dora", "lora_bias"))
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert not [key for key in config if "router" in key or "expert" in key or "moe" in key]


@pytest.mark.parametrize(("rank", "r"), [(None, 3), (3, 3), (5, 5), ("vllm", 8)])
def test_padding_to_a_rank_changes_nothing(rank: Any, r: int, tmp_path: Path) -> None:
    model = mixture(r=3).eval()
    made = export_expert(model, tmp_path / "out", expert=2, rank=rank)
    assert made.r == r
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if ".lora_A." in key} == {r}
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close(
        plain(token_ids()).logits, model(token_ids(), routing_weights=_one_hot(2, 3)).logits
    )


def test_layers_of_other_experts_are_left_out(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", target_modules=["q_proj", "down_proj"])
    save_lora(tmp_path / "b", target_modules=["v_proj"], layers_to_transform=[1])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    made = export_expert(tmp_path / "out", tmp_path / "back", expert="b")
    assert (made.layers, made.dropped_layers) == (1, 4)
    config = LoraConfig.from_pretrained(tmp_path / "back")
    assert config.target_modules == {"model.layers.1.self_attn.v_proj"}


def test_an_untrained_expert_leaves_as_it_is(tmp_path: Path) -> None:
    config = MoELoraConfig(r=2, num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    assert export_expert(model, tmp_path / "fresh", expert=0).r == 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    made = export_expert(model, tmp_path / "zero", expert=0)
    assert (made.r, made.layers) == (1, 2)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "zero").eval()
    assert_equal(plain(token_ids()).logits, tiny_llama().eval()(token_ids()).logits)


def test_adapters_under_an_attached_router_leave_by_their_names(tmp_path: Path) -> None:
    model = two_loras()
    model.attach_router(Router(16, 2).double())
    model.save_pretrained(tmp_path / "both")
    for expert in (1, "second", "1"):
        made = export_expert(tmp_path / "both", tmp_path / "out", expert=expert, force=True)
        assert (made.name, made.index, made.r) == ("second", 1, 3)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    expected = model.eval()(token_ids(), routing_weights=_one_hot(1, 2)).logits
    assert_close(plain(token_ids()).logits, expected)


def test_a_plain_lora_leaves_as_a_clean_copy(tmp_path: Path) -> None:
    model = save_lora(tmp_path / "sql", use_rslora=True, r=3)
    made = export_expert(tmp_path / "sql", tmp_path / "out", expert=0)
    assert (made.name, made.rounding < 2**-50) == ("sql", True)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close(plain(token_ids()).logits, model(token_ids()).logits)


def test_a_mixture_of_another_adapter_name_leaves_a_live_model(tmp_path: Path) -> None:
    model = mixture(name="skills")
    assert export_expert(model, tmp_path / "out", expert=0, adapter="skills").r == 2
    with pytest.raises(ConfigError, match=r"adapter must be one of .*\['skills'\], got 'default'"):
        export_expert(model, tmp_path / "other", expert=0)


@pytest.mark.parametrize("expert", [3, -1, True, 1.0, "3", "-1", "nobody", "", "../0", None, "²"])
def test_there_is_no_such_expert(expert: Any, tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path / "mixture")
    with unchecked_types(), pytest.raises(ConfigError, match="expert must be one of|an index in"):
        export_expert(tmp_path / "mixture", tmp_path / "out", expert=expert)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [2, 0, -1, True, 3.0, "vLLM"])
def test_a_rank_must_hold_the_expert(rank: Any, tmp_path: Path) -> None:
    message = "rank must be an integer of at least 3"
    with unchecked_types(), pytest.raises(ConfigError, match=message):
        export_expert(mixture(r=3), tmp_path / "out", expert=0, rank=rank)


def test_vllm_serves_no_rank_above_its_largest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Block(nn.Linear(600, 600))
    model = get_peft_model(
        base, LoraConfig(r=513, target_modules=["layer"], init_lora_weights=False)
    )
    with pytest.raises(ConfigError, match="it has rank 513, and vLLM serves at most 512"):
        export_expert(model, tmp_path / "out", expert=0, rank="vllm")
