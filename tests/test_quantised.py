"""Mixtures over quantised bases: exact beside the base's output, trained, saved, reloaded."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from moelora import MergeError
from tests.lm import (
    TARGETS,
    checkpoint_blocks,
    lora_layers,
    mixture,
    mixture_config,
    perturb,
    router_parameters,
    run_python,
    tiny_llama,
    token_ids,
    trainable,
)
from tests.mixtures import logits_by_hand
from tests.reference import experts_of, mixture_reference, routing_reference
from tests.tolerances import assert_close, assert_equal

# blocks of 64 weights are what bitsandbytes quantises together.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def plain_base() -> PreTrainedModel:
    return tiny_llama(dtype=torch.float32, initializer_range=0.05, **SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, saved in float32."""
    folder = tmp_path_factory.mktemp("base")
    plain_base().save_pretrained(folder)
    return folder


def _loaded(config: Callable[[], Any]) -> Callable[[Path], PreTrainedModel]:
    """Quantised by transformers while it loads."""

    def load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(), dtype=torch.float32, device_map={"": "cpu"}
        )

    return load


def _nf4(**fields: Any) -> Callable[[], BitsAndBytesConfig]:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **fields}
    return lambda: BitsAndBytesConfig(load_in_4bit=True, **options)


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_by_hand(folder: Path) -> PreTrainedModel:
    """Quantised by torchao's own call, which transformers knows nothing of."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(base.model, Int8WeightOnlyConfig())
    return base


def _hqq(folder: Path) -> PreTrainedModel:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    base = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(base.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent = base.model.get_submodule(name.rpartition(".")[0])
            quantised = HQQLinear(
                module,
                BaseQuantizeConfig(nbits=4, group_size=64),
                compute_dtype=torch.float32,
                device="cpu",
            )
            setattr(parent, name.rpartition(".")[2], quantised)
    return base


#: How each base is made, the library it needs, and PEFT's class for its layers.
KINDS: dict[str, tuple[Callable[[Path], PreTrainedModel], str, str]] = {
    "bitsandbytes nf4": (_loaded(_nf4()), "bitsandbytes", "Linear4bit"),
    "bitsandbytes nf4, double": (
        _loaded(_nf4(bnb_4bit_use_double_quant=True)),
        "bitsandbytes",
        "Linear4bit",
    ),
    "bitsandbytes int8": (
        _loaded(lambda: BitsAndBytesConfig(load_in_8bit=True)),
        "bitsandbytes",
        "Linear8bitLt",
    ),
    "torchao int8": (_loaded(_torchao), "torchao", "TorchaoLoraLinear"),
    "torchao int8, by hand": (_torchao_by_hand, "torchao", "TorchaoLoraLinear"),
    "HQQ": (_hqq, "hqq", "HqqLoraLinear"),
    "quanto int8": (
        _loaded(lambda: QuantoConfig(weights="int8")),
        "optimum.quanto",
        "Linear",
    ),
}


def _missing(library: str) -> bool:
    parent = library.split(".")[0]
    return importlib.util.find_spec(parent) is None or importlib.util.find_spec(library) is None


every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(_missing(library), reason=f"needs {library}"))
        for kind, (_, library, _) in KINDS.items()
    ],
)


def quantised(kind: str, folder: Path, *, kbit: bool = False, **fields: Any) -> PeftModel:
    """A mixture whose experts and routers are far from their initial values."""
    base = KINDS[kind][0](folder)
    if kbit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return mixture(base, **fields)


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(token_ids(), labels=token_ids()).loss
    return loss


def train(model: PeftModel, steps: int = 3) -> list[float]:
    """Losses before each step and after the last."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, loss_of(model).item()]


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(token_ids()).logits
    return logits


@every_kind
def test_a_layer_adds_the_experts_of_the_formula_to_its_quantised_output(
    kind: str, folder: Path
) -> None:
    model = quantised(kind, folder).eval()
    config = model.peft_config["default"]
    for layer in lora_layers(model).values():
        assert type(layer).__name__ == KINDS[kind][2]
        x = torch.randn(2, 3, layer.in_features)
        logits = logits_by_hand(layer, "default", x, config.router_temperature)
        weights = routing_reference(logits.flatten(0, -2), top_k=2).reshape(logits.shape)
        with torch.no_grad():
            expected = mixture_reference(
                layer.get_base_layer(), experts_of(layer, ["default"], [3]), x, weights
            )
            assert_close(layer(x), expected)


@every_kind
@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_a_mixture_trains_is_saved_and_reloads_to_the_bit(
    scope: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    model = quantised(kind, folder, kbit=True, router_scope=scope)
    before = copy.deepcopy(logits_of(model))
    routers = {name: p.detach().clone() for name, p in router_parameters(model).items()}
    losses = train(model)
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]
    for name, parameter in router_parameters(model).items():
        assert not torch.equal(parameter, routers[name]), name
    trained = logits_of(model)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(KINDS[kind][0](folder), use_gradient_checkpointing=False)
    assert_equal(logits_of(PeftModel.from_pretrained(base, tmp_path)), trained)


@every_kind
def test_the_quantised_base_is_not_trained(kind: str, folder: Path) -> None:
    model = quantised(kind, folder, kbit=True)
    with model.disable_adapter():
        before = logits_of(model)
    train(model)
    with model.disable_adapter():
        assert_equal(logits_of(model), before)


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_blocks_give_the_same_gradients(
    use_reentrant: bool, kind: str, folder: Path
) -> None:
    gradients = []
    for checkpointed in (False, True):
        base = KINDS[kind][0](folder)
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        if checkpointed and not base.is_gradient_checkpointing:
            # PEFT does it for the libraries that transformers loads by itself
            checkpoint_blocks(base, use_reentrant=use_reentrant)
            base.enable_input_require_grads()
        model = mixture(base, expert_capacity_factor=None).train()
        assert model.get_base_model().is_gradient_checkpointing is checkpointed
        loss_of(model).backward()
        gradients.append([p.grad for p in trainable(model).values()])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    assert_close(gradients[1], gradients[0])


@every_kind
def test_generation_needs_no_uncached_loop(kind: str, folder: Path) -> None:
    model, ids = quantised(kind, folder).eval(), token_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    found = model.generate(input_ids=ids, **options)
    for _ in range(4):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert_equal(found, ids)


@every_kind
def test_explicit_weights_hold_over_a_quantised_base(kind: str, folder: Path) -> None:
    model = quantised(kind, folder).eval()
    one_hot = torch.tensor([0.0, 1.0, 0.0])
    found = model(token_ids(), routing_weights=one_hot).logits
    for layer in lora_layers(model).values():
        rank = layer.r["default"] // 3
        layer.lora_B["default"].weight.data[:, :rank] = 0
        layer.lora_B["default"].weight.data[:, 2 * rank :] = 0
    assert_close(found, model(token_ids(), routing_weights=torch.ones(3)).logits)


@every_kind
def test_a_learned_mixture_is_not_merged_into_a_quantised_base(kind: str, folder: Path) -> None:
    model = quantised(kind, folder)
    with pytest.raises(MergeError, match="cannot be merged"):
        model.merge_and_unload()


# Layer classes of libraries that this machine may lack ----------------------------------------


class FakeQuantised(nn.Module):
    """What PEFT's classes for quantised layers ask of a base layer: its sizes and a forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.qweight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        return output


#: The rest of PEFT's classes exist only where their library does.
CLASSES = [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear]


@pytest.mark.parametrize("layer_class", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_that_peft_has_for_quantised_layers_routes(
    layer_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        return layer_class(target, adapter_name, config=config, **kwargs)

    # PEFT asks its dispatchers in turn; this one is asked for every layer that no other took
    monkeypatch.setattr(lora_model, "dispatch_default", dispatch)
    base = tiny_llama()
    for name, module in list(base.named_modules()):
        if name.split(".")[-1] in TARGETS:
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], FakeQuantised(module))
    model = get_peft_model(base, mixture_config(expert_capacity_factor=None)).double()
    perturb(model)
    assert {type(layer) for layer in lora_layers(model).values()} == {layer_class}
    plain = mixture(expert_capacity_factor=None)
    assert_close(logits_of(model), logits_of(plain))
    loss_of(model.train()).backward()
    loss_of(plain.train()).backward()
    gradients = [p.grad for p in trainable(model).values()]
    assert_close(gradients, [p.grad for p in trainable(plain).values()])


# Real GPTQ layers, where their library is there (it compiles its kernels for a minute or more) ----

GPTQ = """
import sys
from pathlib import Path
from transformers import GPTQConfig
from tests.generation.words import word_tokenizer
from tests.test_quantised import *
plain, quantised, saved = (Path(sys.argv[1]) / name for name in ("plain", "quantised", "saved"))
plain_base().save_pretrained(plain)
texts = [" ".join(f"w{(7 * i + 3 * j) % 60 + 1}" for j in range(32)) for i in range(16)]
config = GPTQConfig(bits=4, group_size=32, dataset=texts, tokenizer=word_tokenizer(),
                    model_seqlen=32, backend="torch")
base = AutoModelForCausalLM.from_pretrained(
    plain, quantization_config=config, device_map="cpu", dtype=torch.float32)
base.save_pretrained(quantised)
def load():
    config = GPTQConfig(bits=4, backend="torch")
    return AutoModelForCausalLM.from_pretrained(
        quantised, device_map="cpu", quantization_config=config)
model = mixture(load())
losses = train(model)
model.save_pretrained(saved)
again = PeftModel.from_pretrained(load(), saved)
print({type(layer).__name__ for layer in lora_layers(model).values()}, losses[-1] < losses[0],
      torch.equal(logits_of(again), logits_of(model)))
"""


def test_a_gptq_base_trains_and_reloads(tmp_path: Path) -> None:
    if _missing("gptqmodel") or _missing("optimum.gptq"):
        pytest.skip("needs gptqmodel and optimum")
    finished = run_python(GPTQ, tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "{'GPTQLoraLinear'} True True" in finished.stdout
