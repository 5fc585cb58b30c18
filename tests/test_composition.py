"""Composing: experts keep their function, and routers are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.lora.model import LoraModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration

import moelora
from moelora import MoELoraConfig, compose, freeze_experts, record_routing
from moelora.prototypes import SHARPNESS
from moelora.router_file import read_router_file
from moelora.stacking import common_scaling
from tests.adapters import save_lora
from tests.lm import lora_config, mixture, perturb, tiny_llama, token_ids
from tests.models import LAYER_KINDS, Block, bert_config, gpt2_config, llama_config, t5_config
from tests.tolerances import assert_close, assert_equal

UNEQUAL: dict[str, dict[str, Any]] = {
    "sql": {"r": 2, "lora_alpha": 4},
    "french": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
    },
    "code": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": r".*\.(q_proj|v_proj)",
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    },
    "late": {"r": 1, "layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "partial": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "k_proj"]},
}


def _one_hot(index: int, number: int) -> Tensor:
    weights = torch.zeros(number, dtype=torch.float64)
    weights[index] = 1
    return weights


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Tensor]]:
    """Five plain LoRAs, as unequal as they come, and what a model gives with each."""
    root = tmp_path_factory.mktemp("loras")
    outputs = []
    for seed, (name, fields) in enumerate(UNEQUAL.items()):
        model = save_lora(root / name, seed=seed, **fields)
        outputs.append(model(token_ids()).logits.detach())
    return [root / name for name in UNEQUAL], outputs


@pytest.fixture(scope="module")
def composed(loras: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("composed") / "mixture"
    compose(loras[0], out)
    return out


def test_one_hot_weights_give_each_adapter_alone(loras: Any, composed: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), composed).eval()
    for index, expected in enumerate(loras[1]):
        actual = model(token_ids(), routing_weights=_one_hot(index, len(loras[1]))).logits
        assert_close(actual, expected)


def test_the_experts_have_the_names_of_their_folders_and_keep_them(
    composed: Path, tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), composed)
    model.save_pretrained(tmp_path)
    for folder in (composed, tmp_path):
        assert moelora.describe(folder).router is not None
        assert [expert.name for expert in moelora.describe(folder).experts] == list(UNEQUAL)
        assert read_router_file(folder / "router.safetensors").experts == list(UNEQUAL)


def test_a_composed_mixture_saves_what_it_loads(composed: Path, tmp_path: Path) -> None:
    PeftModel.from_pretrained(tiny_llama(), composed).save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "router.safetensors"):
        before, after = load_file(composed / name), load_file(tmp_path / name)
        assert before.keys() == after.keys()
        assert_equal([after[key] for key in before], list(before.values()))


@settings(max_examples=8)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    alphas=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    kind=st.sampled_from([n for n in LAYER_KINDS if n != "Conv2d with groups"]),
)
def test_padding_and_folding_change_no_expert_of_any_layer_kind(
    ranks: list[int], alphas: list[int], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    base = Block(LAYER_KINDS[kind].make()).double()
    x = LAYER_KINDS[kind].draw(2, 3)
    x = x.double() if x.is_floating_point() else x
    state = base.state_dict()
    outputs = []
    for index, (r, alpha) in enumerate(zip(ranks, alphas, strict=False)):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"])
        fresh = Block(LAYER_KINDS[kind].make()).double()
        fresh.load_state_dict(state)
        model = get_peft_model(fresh, config)
        perturb(model, seed=index)
        model.save_pretrained(root / str(index), save_embedding_layers=False)
        outputs.append(model.eval()(x))
    compose([root / str(index) for index in range(len(ranks))], root / "out")
    mixed = PeftModel.from_pretrained(base, root / "out").eval()
    for index, expected in enumerate(outputs):
        assert_close(mixed(x, routing_weights=_one_hot(index, len(ranks))), expected)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: GPT2LMHeadModel(gpt2_config()), {"target_modules": ["c_attn", "c_fc"]}),
        (lambda: BertModel(bert_config()), {"target_modules": ["query", "dense"]}),
        (lambda: T5ForConditionalGeneration(t5_config()), {"target_modules": ["q", "wo"]}),
        (lambda: GPT2LMHeadModel(gpt2_config()), {"target_modules": ["wte", "c_proj"]}),
        (
            lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
            {"target_modules": ["lm_head", "q_proj"]},
        ),
    ],
    ids=["gpt2", "bert", "t5", "gpt2 with embeddings", "llama with a tied head"],
)
def test_other_architectures_compose(make: Any, fields: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = make().double().state_dict()

    def base() -> nn.Module:
        model = make().double()
        model.load_state_dict(state)
        return model.eval()

    def run(model: nn.Module, **weights: Any) -> Tensor:
        ids = torch.randint(1, 30, (2, 5), generator=torch.Generator().manual_seed(0))
        extra = {"decoder_input_ids": ids[:, :3]} if "T5" in type(base()).__name__ else {}
        return model(input_ids=ids, **extra, **weights)[0]

    outputs = []
    for index in range(2):
        model = get_peft_model(base(), LoraConfig(r=index + 1, lora_alpha=3, **fields))
        perturb(model, seed=index)
        model.save_pretrained(tmp_path / str(index))
        outputs.append(run(model.eval()))
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    mixed = PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    for index, expected in enumerate(outputs):
        assert_close(run(mixed, routing_weights=_one_hot(index, 2)), expected)


@pytest.mark.parametrize("name", ["layers", "default", "0", "weight", "lora_A"])
def test_hazardous_expert_names_do_no_harm(name: str, loras: Any, tmp_path: Path) -> None:
    compose(loras[0][:2], tmp_path / "out", names=[name, "other"])
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close(model(token_ids(), routing_weights=_one_hot(0, 2)).logits, loras[1][0])


# Scaling, dtype and targets --------------------------------------------------------------------


def test_scalings_whose_ratio_is_a_power_of_two_are_exact(tmp_path: Path) -> None:
    for index, alpha in enumerate([4, 8, 1]):
        save_lora(tmp_path / str(index), dtype=torch.bfloat16, seed=index, r=2, lora_alpha=alpha)
    made = compose([tmp_path / str(i) for i in range(3)], tmp_path / "out")
    assert (made.rounding, made.dtype) == (0.0, "bfloat16")


def test_other_scalings_are_rounded_once_in_float32_and_told(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", dtype=torch.bfloat16, r=2, lora_alpha=4)
    save_lora(tmp_path / "b", dtype=torch.bfloat16, r=2, lora_alpha=3, seed=1)
    made = compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert made.dtype == "float32"
    # bfloat16 has 8 bits, three quarters of it need 10: exact in float32
    assert made.rounding == 0
    save_lora(tmp_path / "c", dtype=torch.float32, r=3, lora_alpha=1, seed=1)
    made = compose([tmp_path / "a", tmp_path / "c"], tmp_path / "out2")
    assert 0 < made.rounding < 2**-24


def test_the_common_scaling_is_the_one_that_rounds_the_fewest() -> None:
    assert common_scaling([1.5, 2.0, 0.25]) == 2.0
    assert common_scaling([1.5, 3.0, 2.0]) == 1.5
    assert common_scaling([0.0]) == 1.0


def test_short_targets_are_kept_where_they_mean_the_same_layers(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", target_modules=["q_proj"])
    save_lora(tmp_path / "b", target_modules=["v_proj", "q_proj"])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    config = MoELoraConfig.from_pretrained(tmp_path / "out")
    assert config.target_modules == {"q_proj", "v_proj"}


def test_differing_restrictions_name_every_layer_in_full(composed: Path) -> None:
    config = MoELoraConfig.from_pretrained(composed)
    assert "model.layers.1.self_attn.q_proj" in config.target_modules
    assert len(config.target_modules) == 12
    assert config.layers_to_transform is None


def test_equal_restrictions_are_kept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_lora(tmp_path / name, layers_to_transform=[1], target_modules=["q_proj"])
    compose([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    config = MoELoraConfig.from_pretrained(tmp_path / "out")
    assert (config.target_modules, config.layers_to_transform) == ({"q_proj"}, [1])


# Routers -----------------------------------------------------------------------------------------


def _routings(folder: Path, base: nn.Module | None = None) -> dict[str, Any]:
    model = PeftModel.from_pretrained(base or tiny_llama(), folder).eval()
    with record_routing(model) as record:
        model(token_ids())
    return record.routing


def test_arrow_routes_as_pefts_own_arrow(tmp_path: Path) -> None:
    """The same weights from PEFT's implementation, whose prototypes come from power iterations."""
    for index in range(3):
        save_lora(tmp_path / str(index), seed=index, r=2, lora_alpha=4)
    compose([tmp_path / str(i) for i in range(3)], tmp_path / "out", temperature=0.5, top_k=2)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "0", adapter_name="task_0")
    for index in (1, 2):
        theirs.load_adapter(tmp_path / str(index), adapter_name=f"task_{index}")
    names = [f"task_{index}" for index in range(3)]
    arrow = ArrowConfig(top_k=2, router_temperature=0.5)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    targets = theirs.peft_config["task_0"].target_modules
    theirs.add_adapter("arrow_router", LoraConfig(r=2, arrow_config=arrow, target_modules=targets))
    theirs.base_model.set_adapter("arrow_router")
    _use_exact_prototypes(theirs)
    expected = theirs.eval()(token_ids()).logits
    actual = ours(token_ids()).logits
    difference = (actual - expected).abs().max()
    assert difference < 1e-3 * expected.abs().max()


def _use_exact_prototypes(model: PeftModel) -> None:
    """Let PEFT's power iteration converge, which 15 steps do not."""
    for module in model.modules():
        if type(module).__name__ == "ArrowLoraLinearLayer":
            original = module.top_right_singular_vec_from_BA
            module.top_right_singular_vec_from_BA = lambda a, b, f=original: f(a, b, iters=3000)


def test_arrow_logits_are_the_absolute_projections_on_the_top_direction(tmp_path: Path) -> None:
    models = [save_lora(tmp_path / str(i), seed=i, target_modules=["down_proj"]) for i in range(2)]
    compose([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    layer = model.base_model.model.get_submodule(name)
    x = torch.randn(50, layer.in_features, dtype=torch.float64)
    logits = layer.lora_router["default"](x)
    for index, one in enumerate(models):
        lora = one.base_model.model.get_submodule(name)
        delta = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        direction = torch.linalg.svd(delta).Vh[0]
        expected = (x @ direction).abs()
        assert bool((logits[:, index] <= expected + 1e-12).all())
        assert bool((expected - logits[:, index] < 0.56 / SHARPNESS).all())


def test_an_expert_that_lacks_a_layer_has_arrow_logit_zero_there(composed: Path) -> None:
    routing = _routings(composed)["model.layers.0.mlp.down_proj"]
    lacking = [1, 2, 3]
    assert not bool(routing.router_logits[:, lacking].any())
    assert bool((routing.router_logits[:, 0] > 0).all())


def test_the_zeros_router_takes_the_mean_of_the_experts(loras: Any, tmp_path: Path) -> None:
    made = compose(loras[0], tmp_path / "out", router="zeros")
    assert made.top_k == len(loras[0])
    for routing in _routings(tmp_path / "out").values():
        assert_close(routing.routing_weights, torch.full_like(routing.routing_weights, 1 / 5))


def test_the_train_router_is_small_random_and_repeatable(loras: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compose(loras[0][:2], tmp_path / name, router="train", seed=seed)
    a, b, c = (load_file(tmp_path / name / "router.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)
    assert 0.01 < torch.cat([value.flatten() for value in a.values()]).std() < 0.03


def test_the_router_alone_trains_after_freezing_the_experts(loras: Any, tmp_path: Path) -> None:
    compose(loras[0][:3], tmp_path / "out", router="train")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out", is_trainable=True)
    names = freeze_experts(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimiser.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert sorted(changed) == sorted(names)


def test_padding_stays_zero_when_the_experts_are_trained(loras: Any, tmp_path: Path) -> None:
    compose(loras[0][:2], tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out", is_trainable=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path / "trained")
    told = moelora.describe(tmp_path / "trained").experts
    assert [(expert.rank, expert.layers) for expert in told] == [(2, 6), (3, 4)]


def test_a_model_without_a_router_of_that_name_is_left_alone() -> None:
    model = mixture(name="other")
    with pytest.raises(moelora.ConfigError, match="'default' has no router"):
        freeze_experts(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


# Sources -----------------------------------------------------------------------------------------


def test_adapters_of_a_live_model_compose_as_their_folders_do(loras: Any, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), loras[0][0], adapter_name="sql")
    for path in loras[0][1:]:
        model.load_adapter(path, adapter_name=path.name)
    compose(loras[0], tmp_path / "folders")
    for source in (model, model.base_model):
        compose(source, tmp_path / "live", force=True)
        ours, theirs = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "folders")
        )
        assert ours.keys() == theirs.keys()
        assert_equal([ours[key] for key in theirs], list(theirs.values()))
    assert isinstance(model.base_model, LoraModel)


def test_the_experts_of_a_mixture_become_experts(loras: Any, tmp_path: Path) -> None:
    model = mixture()
    model.save_pretrained(tmp_path / "mix")
    made = compose([tmp_path / "mix", loras[0][0]], tmp_path / "out")
    assert [expert.name for expert in made.experts] == ["mix.0", "mix.1", "mix.2", "sql"]
    mixed = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    for index in range(3):
        expected = model.eval()(token_ids(), routing_weights=_one_hot(index, 3)).logits
        assert_close(mixed(token_ids(), routing_weights=_one_hot(index, 4)).logits, expected)
    assert_close(mixed(token_ids(), routing_weights=_one_hot(3, 4)).logits, loras[1][0])
    assert "routers of mixtures among the sources are not kept" in " ".join(made.notes)


def test_equal_folder_names_take_the_folder_above(tmp_path: Path) -> None:
    for index, name in enumerate(("sql", "french")):
        save_lora(tmp_path / name / "checkpoint-100", seed=index)
    paths = [tmp_path / name / "checkpoint-100" for name in ("sql", "french")]
    made = compose(paths, tmp_path / "out")
    assert [e.name for e in made.experts] == ["sql-checkpoint-100", "french-checkpoint-100"]


def test_notes_tell_what_a_reader_should_know(tmp_path: Path) -> None:
    save_lora(tmp_path / "a", target_modules=["q_proj"], lora_dropout=0.1)
    untrained = get_peft_model(tiny_llama(), lora_config())
    untrained.save_pretrained(tmp_path / "new")
    notes = " ".join(compose([tmp_path / "a", tmp_path / "new"], tmp_path / "out").notes)
    assert "lora_dropout differs ([0.1, 0.0])" in notes
    assert "'new' is zero" in notes
    assert "'a' adapts 2 of 6 layers" in notes


def test_adapters_of_the_hub_compose(
    loras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here; a third part of the id is a subfolder."""

    def download(repo: str, filename: str, *, subfolder: str | None = None, **_: Any) -> str:
        place = loras[0][0].parent / (subfolder or repo.split("/")[1]) / filename
        if not place.exists():
            raise LocalEntryNotFoundError(f"{place} is not in the cache")
        return str(place)

    monkeypatch.setattr("moelora.adapter_folder.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    made = compose(["someone/sql", "someone/many/french"], tmp_path / "out")
    assert [expert.name for expert in made.experts] == ["sql", "french"]
    assert made.experts[0].source == "someone/sql"
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert_close(model(token_ids(), routing_weights=_one_hot(1, 2)).logits, loras[1][1])
    exported = moelora.export_expert("someone/code", tmp_path / "code", expert=0)
    assert (exported.name, exported.r) == ("code", 6)
    assert moelora.describe("someone/many/french").experts[0].rank == 3
