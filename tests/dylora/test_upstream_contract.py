"""How DyLoRA-MoE's published package calls PEFT, so that it keeps running with ``import moelora``.

A stand-in of our own that makes the same calls: adapters ``expert_<i>`` over whatever attention
projections there are, the head untied, a gate outside of the model that reads ``hidden_states[-1]``
of a first pass with the adapters in effect, ``set_adapter`` on ``base_model`` with a list, weights
passed as ``routing_weights`` in a second pass, generation with one expert, one folder per expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moelora
from tests.dylora.tiny import BASES, VOCABULARY, counting, token_ids
from tests.tolerances import assert_close, assert_equal

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_attn"]


class Gate(nn.Module):
    """Dense while an expert is young, then the top one; maturity is a plain tensor attribute."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.maturity = torch.ones(experts)

    def forward(self, states: Tensor) -> Tensor:
        logits = self.gate(states)
        if bool((self.maturity == 0).any()):
            return F.softmax(logits / 2.0, dim=-1)
        top, chosen = logits.topk(1, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, top.softmax(dim=-1))

    def add_expert(self) -> None:
        old, experts = self.gate, self.gate.out_features + 1
        self.gate = nn.Linear(old.in_features, experts)
        with torch.no_grad():
            self.gate.weight[:-1] = old.weight
            self.gate.bias[:-1] = old.bias
        self.maturity = torch.cat([self.maturity, torch.zeros(1)])


class StandIn(nn.Module):
    """A model over a folder, as the published class is made."""

    def __init__(self, folder: Path, experts: int = 3) -> None:
        super().__init__()
        base: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), token=None, attn_implementation="eager"
        )
        base.config.use_cache = False
        self.config = base.config
        if base.config.tie_word_embeddings:
            tied = base.get_input_embeddings().weight
            base.lm_head = nn.Linear(base.config.hidden_size, base.config.vocab_size, bias=False)
            base.lm_head.weight = nn.Parameter(tied.clone())
        self.number, self.peft_model = 0, base
        for _ in range(experts):
            self.create_expert()
        self.choose(0)
        for name, parameter in self.peft_model.named_parameters():
            if "lora" not in name.lower():
                parameter.requires_grad = False
        self.router = Gate(base.config.hidden_size, experts).to(self.peft_model.device)
        self.weights: Tensor | None = None

    def create_expert(self, r: int = 4) -> None:
        names = {name.split(".")[-1] for name, _ in self.peft_model.named_modules()}
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            inference_mode=False,
            r=r,
            lora_alpha=8,
            lora_dropout=0.05,
            target_modules=sorted(names & set(PROJECTIONS)),
        )
        adapter = f"expert_{self.number}"
        if isinstance(self.peft_model, PeftModel):
            self.peft_model.add_adapter(adapter, config)
        else:
            self.peft_model = get_peft_model(self.peft_model, config, adapter_name=adapter)
        self.number += 1

    def choose(self, expert: int) -> None:
        self.peft_model.set_adapter(f"expert_{expert}")

    def choose_all(self) -> None:
        self.peft_model.base_model.set_adapter([f"expert_{i}" for i in range(self.number)])

    def run(self, ids: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        # ids by position, the rest by name
        return self.peft_model(
            ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        expert_id: int | None = None,
    ) -> Any:
        balance: Tensor | float = 0.0
        if expert_id is not None:
            self.choose(expert_id)
            outputs = self.run(input_ids, attention_mask)
        else:
            states = self.run(input_ids, attention_mask).hidden_states[-1]
            weights = self.router(states)
            self.weights = weights.detach()
            balance = F.mse_loss(
                weights.mean(dim=[0, 1]), torch.full((self.number,), 1 / self.number)
            )
            self.choose_all()
            outputs = self.run(input_ids, attention_mask, routing_weights=weights)
        if labels is None:
            return outputs
        logits = outputs.logits[..., :-1, :].reshape(-1, VOCABULARY)
        loss = F.cross_entropy(logits, labels[..., 1:].reshape(-1))
        return {"loss": loss + 0.01 * balance, "logits": outputs.logits}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        self.peft_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )


@pytest.fixture(params=BASES)
def folder(request: Any, tmp_path: Path) -> Path:
    """A saved base model of each kind."""
    BASES[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made(folder: Path, experts: int = 3) -> StandIn:
    """With experts far from zero, and one of them young, so that the gate has a gradient."""
    torch.manual_seed(0)
    model = StandIn(folder, experts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.router.maturity[-1] = 0
    return model


def data() -> tuple[Tensor, Tensor]:
    ids = token_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


def test_peft_itself_offers_the_config() -> None:
    assert peft.MoELoraConfig is moelora.MoELoraConfig
    assert peft.tuners.lora.MoELoraConfig is moelora.MoELoraConfig


def test_training_moves_every_expert_and_the_gate(folder: Path) -> None:
    model = made(folder).train()
    rows = counting(20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(10):
        batch = rows[step % 2 * 10 :][:10]
        loss = model(batch, attention_mask=torch.ones_like(batch), labels=batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            # all experts are trainable only once all were activated
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-2
            )
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads.values())
        assert sum("expert_" in name for name in grads) % 3 == 0
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3


def test_weights_reach_the_layers_and_are_not_swallowed(folder: Path) -> None:
    # float32 sums of two ways differ by processor
    model, (ids, mask) = made(folder).eval().double(), data()
    model(ids, attention_mask=mask)
    one_hot = torch.zeros(2, 10, 3, dtype=torch.float64)
    one_hot[..., 2] = 1
    model.choose_all()
    routed = model.run(ids, mask, routing_weights=one_hot).logits
    summed = model.run(ids, mask).logits
    model.choose(2)
    alone = model.run(ids, mask).logits
    assert_close(routed, alone)
    assert not torch.allclose(routed, summed, atol=1e-2)


def test_an_expert_given_by_id_trains_alone(folder: Path) -> None:
    model, (ids, mask) = made(folder).train(), data()
    model(ids, attention_mask=mask, labels=ids, expert_id=1)["loss"].backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched
    assert all(".expert_1." in name for name in touched)


def test_evaluation_leaves_hidden_states_and_no_cache(folder: Path) -> None:
    model, (ids, mask) = made(folder).eval(), data()
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask)
    assert outputs.logits.shape == (2, 10, VOCABULARY)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert outputs.past_key_values is None
    assert model.weights.shape == (2, 10, 3)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_the_expert_that_most_rows_prefer(folder: Path, beams: int) -> None:
    model, (ids, mask) = made(folder).eval(), data()
    with torch.no_grad():
        weights = model.router(model.run(ids, mask).hidden_states[-1])
        expert = int(weights.mean(dim=1).argmax(dim=1).mode().values)
        model.choose(expert)
        found = model.peft_model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, num_beams=beams, do_sample=False
        )
    assert found.shape == (2, 14)
    assert_equal(found[:, :10], ids)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_gradient_checkpointing_changes_no_gradient(
    folder: Path, use_reentrant: bool | None
) -> None:
    found, (ids, mask) = [], data()
    for checkpointing in (False, True):
        model = made(folder).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.choose_all()
        if checkpointing:
            options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(options)
            model.peft_model.enable_input_require_grads()
        model(ids, attention_mask=mask, labels=ids)["loss"].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_a_new_expert_joins_while_training(folder: Path) -> None:
    model, (ids, mask) = made(folder).train(), data()
    model(ids, attention_mask=mask, labels=ids)["loss"].backward()
    model.create_expert(r=8)
    model.router.add_expert()
    model.choose(3)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids)["loss"].backward()
    assert model.weights.shape == (2, 10, 4)
    for index in range(4):
        # a fresh expert's B is zero, so its A has no gradient yet
        ends = (f"lora_B.expert_{index}.weight",)
        touched = [p.grad for n, p in model.named_parameters() if n.endswith(ends)]
        assert all(grad is not None and bool(grad.any()) for grad in touched)


def test_experts_saved_one_by_one_are_loaded_into_a_new_model(folder: Path, tmp_path: Path) -> None:
    model, (ids, mask) = made(folder).eval(), data()
    out = tmp_path / "checkpoint"
    for index in range(3):
        name = f"expert_{index}"
        model.peft_model.set_adapter(name)
        model.peft_model.save_pretrained(
            str(out / "peft_adapters" / name), selected_adapters=[name]
        )
        assert (out / "peft_adapters" / name / name / "adapter_model.safetensors").is_file()
    save_file(model.router.state_dict(), out / "router.safetensors")
    model.choose_all()
    expected = model(ids, attention_mask=mask).logits
    other = StandIn(folder).eval()
    for index in range(3):
        name = f"expert_{index}"
        other.peft_model.load_adapter(str(out / "peft_adapters" / name / name), adapter_name=name)
    other.router.load_state_dict(load_file(out / "router.safetensors"))
    other.router.maturity = model.router.maturity
    other.choose_all()
    assert_equal(other(ids, attention_mask=mask).logits, expected)
    own = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    assert {
        n for n, t in other.state_dict().items() if n in own and not torch.equal(t, own[n])
    } == set()


def test_a_state_dict_of_the_whole_model_is_taken_back(folder: Path) -> None:
    model, (ids, mask) = made(folder).eval(), data()
    model.choose_all()
    other = StandIn(folder).eval()
    other.peft_model.load_state_dict(model.peft_model.state_dict())
    other.router.load_state_dict(model.router.state_dict())
    other.router.maturity = model.router.maturity
    other.choose_all()
    assert_equal(other(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_the_trainer_trains_and_evaluates_it(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    model.choose_all()
    rows = [{"input_ids": row, "labels": row} for row in counting(8, length=10)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


# The scripts that come with it ------------------------------------------------------------------


def test_a_router_is_attached_asked_and_taken_off_by_the_tuner(folder: Path) -> None:
    model = made(folder).peft_model
    tuner, router = model.base_model, nn.Sequential(nn.Linear(32, 3), nn.Softmax(-1))
    states = torch.randn(2, 10, 32)
    assert not tuner.has_router()
    assert tuner.get_routing_weights(states) is None
    config = peft.MoELoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], num_experts=3)
    tuner.attach_router(router, config)
    assert tuner.has_router()
    assert tuner.router is router
    assert tuner.moe_config is config
    assert tuner.get_routing_weights(states).shape == (2, 10, 3)
    tuner.detach_router()
    assert not tuner.has_router()
    assert tuner.router is None
    assert tuner.moe_config is None
    for wrong in ((("not a module",), {}), ((router,), {"moe_config": "no config"})):
        with pytest.raises(TypeError):
            tuner.attach_router(*wrong[0], **wrong[1])


def test_a_module_that_hands_its_keywords_to_its_layers_is_routed() -> None:
    class Simple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 32)
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.linear(self.embed(x), **kwargs).mean()

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
    model = get_peft_model(Simple(), config, adapter_name="expert_0")
    model.add_adapter("expert_1", config)
    model.base_model.set_adapter(["expert_0", "expert_1"])
    logits = torch.randn(2, 5, 2, requires_grad=True)
    model(torch.randint(0, 100, (2, 5)), routing_weights=logits.softmax(-1)).backward()
    assert bool(logits.grad.any())


def test_a_wrapped_layer_forward_sees_the_keyword(folder: Path, monkeypatch: Any) -> None:
    layer_class = peft.tuners.lora.layer.Linear
    original, seen = layer_class.forward, []

    def traced(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("routing_weights"))
        return original(self, x, *args, **kwargs)

    model, (ids, mask) = made(folder).eval(), data()
    model.choose_all()
    monkeypatch.setattr(layer_class, "forward", traced)
    weights = torch.full((2, 10, 3), 1 / 3)
    model.run(ids, mask, routing_weights=weights)
    assert seen
    assert all(each is not None and each.shape == (2, 10, 3) for each in seen)
