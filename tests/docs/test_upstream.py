"""The proposal's diffs apply to the installed PEFT, and do there what ``docs/upstream.md`` says."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import moelora
from benchmarks import upstream
from moelora import _peft
from tests.demo.tiny import save_tiny_model, tiny_llama
from tests.docs.blocks import ROOT, Block, blocks_of, read
from tests.docs.given import MODEL_NAMES

PAGE = read("docs/upstream.md")

CHECKS = """
import torch
from safetensors.torch import save_file
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as MAPPING
assert "moelora" not in __import__("sys").modules

def gradients(checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.zero_grad()
    model(input_ids=ids, labels=ids, routing_weights=weights).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

tensors = {"before": before, "after": after, "weights": weights}
plain, checkpointed = gradients(False), gradients(True)
assert plain and all(torch.equal(plain[n], checkpointed[n]) for n in plain)
model.eval()

# an error leaves no hooks
for arguments in ({"routing_weights": weights}, {"adapter_names": ["__base__"] * 2}):
    try:
        model(input_ids=ids + 10**6, **arguments)
    except IndexError:
        pass
    else:
        raise AssertionError
assert not any(len(m._forward_pre_hooks) for m in model.modules() if hasattr(m, "lora_A"))

# plugins: found by their type, imported only then, unknown ones refused as before
import sys
assert "brings_gold" not in sys.modules
assert MAPPING["GOLD"].__name__ == "GoldConfig"
assert PeftConfig.from_peft_type(peft_type="GOLD", r=3).r == 3
for unknown in ("SILVER", "LEAD"):  # not named, and named by a package that does not bring it
    try:
        MAPPING[unknown]
    except KeyError as error:
        assert error.args == (unknown,)
    else:
        raise AssertionError(unknown)
tensors |= {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
save_file({n: t.contiguous() for n, t in tensors.items()}, "tensors.safetensors")
"""
PLUGIN = """
from dataclasses import dataclass
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

@dataclass
class GoldConfig(LoraConfig):
    pass

PEFT_TYPE_TO_CONFIG_MAPPING["GOLD"] = GoldConfig
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return upstream.copies(tmp_path_factory.mktemp("copies"))


def _run(place: Path, folder: Path, code: str) -> None:
    path = os.pathsep.join(map(str, (place, folder, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _mentioning(word: str) -> Block:
    (block,) = [b for b in blocks_of(PAGE) if b.language == "python" and word in b.code]
    return block


def test_the_examples_give_what_moelora_gives_on_stock_peft(
    copies: dict[str, Path], tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base")
    (tmp_path / "brings_gold.py").write_text(PLUGIN)
    metadata = tmp_path / "gold-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gold\nVersion: 1\n")
    names = "GOLD = brings_gold\nLEAD = brings_gold\n"
    (metadata / "entry_points.txt").write_text(f"[peft.plugins]\n{names}")
    story = [_mentioning(word).code for word in ("torch.rand", "weighted_forward", "WeightedSum")]
    code = MODEL_NAMES.sub(base.as_posix(), "\n".join(story)) + CHECKS
    _run(copies["patched"], tmp_path, "import torch\ntorch.manual_seed(0)\n" + code)

    tensors = load_file(tmp_path / "tensors.safetensors")
    torch.testing.assert_close(tensors["after"], tensors["before"], rtol=0, atol=0)
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"), adapter_name="sql")
    model.add_adapter("french", LoraConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["sql", "french"])
    loras = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    assert not model.load_state_dict(loras, strict=False).unexpected_keys
    ids = torch.arange(12).reshape(2, 6)
    ours = model.eval()(input_ids=ids, routing_weights=tensors["weights"]).logits
    torch.testing.assert_close(ours, tensors["after"])


def test_on_stock_peft_a_forward_that_raises_leaves_its_adapter_names_behind(
    copies: dict[str, Path], tmp_path: Path
) -> None:
    """The fault that the first diff mends; should PEFT mend it itself, the page has to say so."""
    base = save_tiny_model(tmp_path / "base")
    setup = MODEL_NAMES.sub(base.as_posix(), _mentioning("torch.rand").code)
    failing, again = _mentioning("adapter_names=").code.splitlines()
    _run(
        copies["stock"],
        tmp_path,
        f"{setup}\nright = model(input_ids=ids).logits\n"
        f"try:\n    {failing}\nexcept IndexError:\n    pass\nelse:\n    raise AssertionError\n"
        f"then = {again}\nassert not torch.equal(then, right)\n"
        f"with model.disable_adapter():\n    base = model(input_ids=ids).logits\n"
        f"assert torch.equal(then, base)\n",
    )


def test_every_patch_stands_in_the_table() -> None:
    table = PAGE.split("## Every patch")[1]
    moelora.uninstall()
    try:
        names = {patch.name for patch in _peft._patches()}
    finally:
        moelora.install()
    assert [name for name in sorted(names) if f"`{name}`" not in table] == []


def test_the_costs_are_those_of_the_file_and_of_these_diffs() -> None:
    content = json.loads(upstream.OUT.read_text(encoding="utf-8"))
    assert upstream.with_table(PAGE, content) == PAGE
    digest = hashlib.sha256("".join(upstream.diffs()).encode()).hexdigest()
    assert content["diffs_sha256"] == digest
    assert importlib.metadata.version("peft") in PAGE
