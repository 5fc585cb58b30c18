"""Installing into PEFT and out of it again, and that plain LoRA notices nothing."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import peft
import peft.tuners.lora
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

import moelora
from moelora import IncompatiblePeftError, UnsupportedLayerError, _peft
from tests.lm import run_python
from tests.models import Block, lora_config, lora_model, randomise
from tests.tolerances import assert_close, assert_equal

_MISSING = object()


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """Leave the plugin installed, whatever a test did."""
    yield
    moelora.install()


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(subclass) for subclass in cls.__subclasses__()))


def everything_of_peft() -> dict[str, object]:
    """Every attribute of every class and module that the plugin might touch, and the mappings."""
    owners: set[Any] = {
        peft,
        peft.tuners,
        peft.tuners.lora,
        PreTrainedModel,
        *subclasses(LoraLayer),
    }
    owners |= subclasses(PeftModel) | subclasses(peft.tuners.tuners_utils.BaseTuner)
    owners |= {peft.PeftMixedModel, peft.PeftConfig, LoraConfig, peft.PeftType}
    owners |= {peft.mapping, peft.mapping_func, peft.peft_model, peft.utils.save_and_load}
    found = {
        f"{owner.__module__ if isinstance(owner, type) else ''}.{owner.__name__}.{name}": value
        for owner in owners
        for name, value in vars(owner).items()
        if name not in ("__doc__", "__abstractmethods__", "_abc_impl")
    }
    for name, mapping in (
        ("config", PEFT_TYPE_TO_CONFIG_MAPPING),
        ("tuner", PEFT_TYPE_TO_TUNER_MAPPING),
        ("prefix", peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING),
    ):
        found.update({f"{name}[{key!s}]": value for key, value in mapping.items()})
    return found


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [
        name
        for name in {**before, **after}
        if before.get(name, _MISSING) is not after.get(name, _MISSING)
    ]


# Install and uninstall -------------------------------------------------------------------------


def test_uninstalling_restores_the_same_objects() -> None:
    moelora.uninstall()
    clean = everything_of_peft()
    moelora.install()
    assert differences(clean, everything_of_peft())
    moelora.uninstall()
    assert differences(clean, everything_of_peft()) == []


def test_uninstalling_gives_what_a_process_without_the_plugin_has() -> None:
    # in a new process: take the snapshot before the first import of the plugin
    snapshot = inspect.getsource(everything_of_peft) + inspect.getsource(subclasses)
    header = (
        "from __future__ import annotations\nimport peft, peft.tuners.lora, peft.mapping_func\n"
        "import peft.utils.save_and_load\nfrom typing import Any\nfrom peft import *\n"
        "from peft import LoraConfig, PeftModel\nfrom transformers import PreTrainedModel\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING\n"
        "from peft.tuners.lora import LoraLayer\n"
    )
    code = (
        header
        + snapshot
        + "before = everything_of_peft()\nimport moelora\nmoelora.uninstall()\n"
        + "after = everything_of_peft()\n"
        + "print(sorted(n for n in {**before, **after} if before.get(n) is not after.get(n)))\n"
    )
    assert _run(code) == "[]\n"


def test_installing_twice_changes_nothing_more() -> None:
    once = everything_of_peft()
    moelora.install()
    assert differences(once, everything_of_peft()) == []
    moelora.uninstall()
    assert not moelora.is_installed()
    moelora.uninstall()
    assert not moelora.is_installed()


def test_many_threads_install_once() -> None:
    moelora.uninstall()
    clean = everything_of_peft()
    barrier = threading.Barrier(8)

    def install() -> None:
        barrier.wait()
        moelora.install()

    threads = [threading.Thread(target=install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moelora.is_installed()
    moelora.uninstall()
    assert differences(clean, everything_of_peft()) == []


def test_the_config_is_found_in_peft_only_while_installed() -> None:
    for module in (peft, peft.tuners.lora):
        assert module.MoELoraConfig is moelora.MoELoraConfig
    moelora.uninstall()
    for module in (peft, peft.tuners.lora):
        assert not hasattr(module, "MoELoraConfig")
    assert "MOELORA" not in PEFT_TYPE_TO_CONFIG_MAPPING
    assert "MOELORA" not in PEFT_TYPE_TO_TUNER_MAPPING


def test_patched_functions_keep_their_names_and_signatures() -> None:
    owners = {
        Linear: ("forward", "get_delta_weight"),
        LoraModel: ("merge_adapter", "add_weighted_adapter", "_create_and_replace"),
        PeftModel: ("from_pretrained", "save_pretrained", "load_adapter", "generate"),
    }
    patched = {
        (owner, name): inspect.signature(getattr(owner, name))
        for owner, names in owners.items()
        for name in names
    }
    moelora.uninstall()
    for (owner, name), signature in patched.items():
        assert signature == inspect.signature(getattr(owner, name)), (owner, name)


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.20.9", "0.22.0", "1.0", "0.22.0.dev0", "0.9"])
def test_a_peft_outside_the_tested_range_is_refused_by_version(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moelora.uninstall()
    clean = everything_of_peft()
    with monkeypatch.context() as patch:
        patch.setattr(peft, "__version__", version)
        with pytest.raises(
            ImportError,
            match=rf"moelora supports peft>=0\.21\.0,<0\.22\.0, but peft {version} is installed",
        ) as caught:
            moelora.install()
    assert isinstance(caught.value, IncompatiblePeftError)
    assert differences(clean, everything_of_peft()) == []
    assert not moelora.is_installed()


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.17"])
def test_every_release_of_the_tested_series_is_taken(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moelora.uninstall()
    monkeypatch.setattr(peft, "__version__", version)
    moelora.install()
    assert moelora.is_installed()


def test_a_changed_signature_is_refused_by_name_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def add_weighted_adapter(self: Any, weights: Any, adapters: Any) -> None:
        """Another order of parameters."""

    moelora.uninstall()
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "add_weighted_adapter", add_weighted_adapter)
        clean = everything_of_peft()
        with pytest.raises(
            IncompatiblePeftError,
            match=r"LoraModel\.add_weighted_adapter of peft .* has parameters .*'weights', 'adap",
        ):
            moelora.install()
        assert differences(clean, everything_of_peft()) == []
        assert not moelora.is_installed()


def test_a_method_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    moelora.uninstall()
    with monkeypatch.context() as patch:
        patch.delattr(LoraModel, "_create_and_replace")
        with pytest.raises(IncompatiblePeftError, match=r"_create_and_replace"):
            moelora.install()


# Before and after models exist -----------------------------------------------------------------


def _routed_by_hand(model: PeftModel, x: Tensor, weights: Tensor) -> Tensor:
    layer = model.base_model.model.layer
    total = layer.base_layer(x)
    for index, name in enumerate(("e0", "e1")):
        update = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        total = total + weights[..., index : index + 1] * update
    return total


def test_models_made_before_importing_take_weights() -> None:
    moelora.uninstall()
    model = lora_model(Block(nn.Linear(4, 4)), [lora_config(), lora_config()])
    randomise(model)
    moelora.install()
    x, weights = torch.randn(2, 3, 4), torch.rand(2, 3, 2)
    assert_close(model(x, routing_weights=weights), _routed_by_hand(model, x, weights))


def test_a_tuner_made_before_importing_takes_weights_when_called_directly() -> None:
    moelora.uninstall()
    model = lora_model(Block(nn.Linear(4, 4)), [lora_config(), lora_config()])
    randomise(model)
    moelora.install()
    x, weights = torch.randn(2, 3, 4), torch.rand(2, 3, 2)
    expected = _routed_by_hand(model, x, weights)
    assert_close(model.base_model(x, routing_weights=weights), expected)
    assert_close(model.base_model.model(x, routing_weights=weights), expected)


def test_uninstalling_leaves_existing_models_plain() -> None:
    model = lora_model(Block(nn.Linear(4, 4)), [lora_config(), lora_config()])
    randomise(model)
    x = torch.randn(2, 3, 4)
    model(x, routing_weights=torch.rand(2))
    before = model(x)
    moelora.uninstall()
    assert_equal(model(x), before)
    with pytest.raises(UnsupportedLayerError, match=r"uninstalled.*moelora\.install\(\)"):
        model(x, routing_weights=torch.rand(2))


def test_reinstalling_serves_the_models_of_the_first_time() -> None:
    model = lora_model(Block(nn.Linear(4, 4)), [lora_config(), lora_config()])
    randomise(model)
    x, weights = torch.randn(2, 3, 4), torch.rand(2, 3, 2)
    expected = _routed_by_hand(model, x, weights)
    for _ in range(2):
        moelora.uninstall()
        moelora.install()
        assert_close(model(x, routing_weights=weights), expected)


# Classes ---------------------------------------------------------------------------------------


def test_a_layer_class_defined_later_takes_weights() -> None:
    class LaterLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x, *args, **kwargs)

    config = lora_config()
    config._register_custom_module({nn.Linear: LaterLinear})
    second = lora_config()
    second._register_custom_module({nn.Linear: LaterLinear})
    model = lora_model(Block(nn.Linear(4, 4)), [config, second])
    randomise(model)
    layer = model.base_model.model.layer
    assert type(layer) is LaterLinear
    x, weights = torch.randn(2, 3, 4), torch.rand(2, 3, 2)
    assert_close(model(x, routing_weights=weights), _routed_by_hand(model, x, weights))
    model(x)
    assert layer.calls == 1


def test_a_layer_class_defined_later_is_restored_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    later = type("Later", (Linear,), {"forward": forward})
    assert vars(later)["forward"] is not forward
    moelora.uninstall()
    assert vars(later)["forward"] is forward


def test_a_layer_class_defined_while_uninstalled_is_served_after_installing() -> None:
    moelora.uninstall()

    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    between = type("Between", (Linear,), {"forward": forward})
    assert vars(between)["forward"] is forward
    moelora.install()
    assert vars(between)["forward"] is not forward


def test_adalora_is_not_touched() -> None:
    classes = [cls for cls in subclasses(LoraLayer) if issubclass(cls, AdaLoraLayer)]
    now = {cls: dict(vars(cls)) for cls in classes}
    moelora.uninstall()
    assert classes
    assert {cls: dict(vars(cls)) for cls in classes} == now


def test_adalora_gives_the_same_with_and_without_the_plugin() -> None:
    def output() -> Tensor:
        torch.manual_seed(0)
        config = AdaLoraConfig(target_modules=["layer"], total_step=10, init_lora_weights=False)
        model = get_peft_model(Block(nn.Linear(4, 4)), config)
        return model(torch.randn(2, 4))

    installed_output = output()
    moelora.uninstall()
    assert_equal(installed_output, output())


# Plain LoRA is the same to the bit -------------------------------------------------------------

_TRAINING = """
import sys, hashlib
{imports}
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)

def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().float().numpy().tobytes())
    return found.hexdigest()

llama = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32,
                    num_attention_heads=2, num_key_value_heads=1)
gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32)
cases = [
    (LlamaForCausalLM, llama, dict(target_modules="all-linear"), torch.float32),
    (LlamaForCausalLM, llama, dict(target_modules=["q_proj"], use_dora=True), torch.float32),
    (LlamaForCausalLM, llama, dict(target_modules=["embed_tokens", "v_proj"]), torch.bfloat16),
    (GPT2LMHeadModel, gpt2, dict(target_modules=["c_attn"], lora_dropout=0.3), torch.float32),
]
for model_class, config, lora, dtype in cases:
    torch.manual_seed(0)
    model = get_peft_model(model_class(config).to(dtype),
                           LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **lora))
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **lora))
    model.base_model.set_adapter(["default", "second"])
    ids = torch.randint(0, 32, (2, 6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        print(digest([output.loss, output.logits]))
        print(digest([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
    print(digest(model.state_dict().values()), sorted(model.state_dict())[:3])
    model.eval()
    print(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist())
    print(digest([model.merge_and_unload()(input_ids=ids).logits]))
"""


def _run(code: str) -> str:
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_training_plain_lora_is_the_same_to_the_bit_with_and_without_the_plugin() -> None:
    # one process for both, since starting it costs the most
    trainings = [
        _TRAINING.format(imports=imports)
        for imports in ("assert 'moelora' not in sys.modules", "import moelora")
    ]
    without, with_it = _run("print('NEXT')\n".join(trainings)).split("NEXT\n")
    assert without.count("\n") == 4 * 7
    assert with_it == without


def test_a_layers_own_forward_runs_when_nothing_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls reach PEFT's code, so that what others patch into it stays in effect."""
    calls: list[str] = []
    original = LoraLayer._check_forward_args

    def check(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(type(self).__name__)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "_check_forward_args", check)
    model = lora_model(Block(nn.Linear(4, 4)), [lora_config()])
    model(torch.randn(2, 4))
    model(torch.randn(2, 4), routing_weights=None)
    assert calls == ["Linear", "Linear"]


def test_the_undo_list_is_empty_after_uninstalling() -> None:
    moelora.uninstall()
    assert _peft._undo == []
