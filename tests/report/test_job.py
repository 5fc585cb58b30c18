"""Reports of real models: what is counted, for every kind of routing and of base model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moelora import MoELoraConfig, ReportError, Router, routing_report
from moelora.report import job
from moelora.report.results import RoutingReport
from tests.demo.tiny import tiny_llama
from tests.lm import lora_config, mixture, mixture_config, perturb, two_loras
from tests.models import unchecked_types
from tests.report.tiny import DOMAINS, TOKENIZER, llama_mixture, tiny_gpt2, tiny_t5


def report_of(model: nn.Module, domains: Any = None, **options: Any) -> RoutingReport:
    options = {"max_length": 16, "permutations": 5, **options}
    return routing_report(model, TOKENIZER, domains or DOMAINS, **options)


def by_hand(model: nn.Module, name: str, texts: list[str], *, max_length: int) -> Tensor:
    """Routing weights of one layer's router, text by text and without any padding."""
    layer = model.get_base_model().get_submodule(name)
    router = layer.lora_router["default"]
    found = []
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for text in texts:
        ids = TOKENIZER(text).input_ids
        for start in range(0, len(ids), max_length):
            with torch.no_grad():
                model(torch.tensor([ids[start : start + max_length]]))
    hook.remove()
    logits = torch.cat([x[0] for x in found]).double() @ router.weight.detach().double().T / 2.0
    best = logits.argsort(dim=-1, descending=True)[:, :2]
    kept = torch.full_like(logits, float("-inf")).scatter(-1, best, logits.gather(-1, best))
    return kept.softmax(dim=-1)


@pytest.fixture(scope="module")
def report() -> RoutingReport:
    return report_of(llama_mixture())


def test_loads_are_those_of_single_texts_without_padding(report: RoutingReport) -> None:
    model = llama_mixture()
    router = report.routers[3]
    loads = [by_hand(model, router.name, texts, max_length=16) for texts in DOMAINS.values()]
    for actual, weights in zip(router.domain_load, loads, strict=True):
        assert actual == pytest.approx(weights.mean(dim=0).tolist(), abs=2e-6)
    whole = torch.cat(loads)
    assert router.tokens == len(whole)
    assert router.load == pytest.approx(whole.mean(dim=0).tolist(), abs=2e-6)
    bits = -(whole * whole.clamp(min=1e-300).log2()).sum(dim=-1).mean().item()
    assert router.token_entropy == pytest.approx(bits, abs=2e-6)
    served = (whole > 0).double()
    together = served.T @ served / len(whole)
    assert torch.tensor(router.coactivation).numpy() == pytest.approx(together.numpy(), abs=2e-6)


def test_the_size_of_batches_changes_nothing(report: RoutingReport) -> None:
    one = report_of(llama_mixture(), batch_size=1)
    for router, other in zip(report.routers, one.routers, strict=True):
        assert router.load == pytest.approx(other.load, abs=1e-5)
        assert router.information.observed == pytest.approx(other.information.observed, abs=1e-5)
        assert router.information.shuffled_max == pytest.approx(
            other.information.shuffled_max, abs=1e-5
        )


def test_every_load_sums_to_one(report: RoutingReport) -> None:
    for router in report.routers:
        rows = [router.load, *router.domain_load, *router.shuffled_load]
        rows += [row for row in (*router.by_position, *router.by_order) if row is not None]
        assert [sum(row) for row in rows] == pytest.approx([1.0] * len(rows), abs=1e-5)
        assert [row[i] for i, row in enumerate(router.coactivation)] == router.served
    for load in (report.load, *report.domain_load, *(layer.load for layer in report.layers)):
        assert sum(load) == pytest.approx(1.0, abs=1e-5)


def test_positions_are_those_in_the_passage() -> None:
    texts = {"a": ["abcd", "ab", "abc"]}
    model = llama_mixture()
    report = report_of(model, texts, max_length=4)
    router = report.routers[0]
    single = by_hand(model, router.name, texts["a"], max_length=4)
    at = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
    assert report.positions == ["0", "1", "2", "3"]
    for position, row in enumerate(router.by_position):
        assert row == pytest.approx(single[at == position].mean(dim=0).tolist(), abs=2e-6)


def test_the_order_of_the_data_is_kept_domain_by_domain(report: RoutingReport) -> None:
    assert report.order == sorted(report.order)
    assert set(report.order) == {0, 1, 2}
    router = report.routers[0]
    assert len(router.by_order) == len(report.order)
    assert None not in router.by_order


def test_identical_domains_show_no_more_than_chance() -> None:
    texts = ["abc def", "ABC DEF", "123 456", "xyz"] * 10
    report = report_of(llama_mixture(), {"one": texts, "two": list(texts)}, permutations=20)
    assert report.information.observed == pytest.approx(0.0, abs=1e-6)
    assert report.information.shuffled_max > report.information.observed


def test_domains_of_other_letters_show_more_than_chance(report: RoutingReport) -> None:
    seen = report.information
    assert seen.observed > 3 * seen.shuffled_max > 0
    assert seen.shuffled_mean <= seen.shuffled_max


def test_one_domain_has_no_baseline_and_says_so() -> None:
    report = report_of(llama_mixture(), {"only": ["abc"]})
    assert report.information is None
    assert report.shuffled_load is None
    assert {router.information for router in report.routers} == {None}
    assert any("single domain" in note for note in report.notes)


def test_few_passages_are_noted() -> None:
    report = report_of(llama_mixture(), {"a": ["abc"], "b": ["x"] * 9})
    assert any("a (1)" in note for note in report.notes)


@pytest.mark.parametrize(
    ("fields", "scope", "routers"),
    [
        ({}, "module", 6),
        ({"router_scope": "layer"}, "layer", 2),
        ({"router_scope": "model"}, "model", 1),
        ({"router_type": "learned_with_maturity"}, "module", 6),
        ({"router_hidden_size": 4}, "module", 6),
    ],
)
def test_every_kind_of_router_is_reported(fields: dict[str, Any], scope: str, routers: int) -> None:
    report = report_of(llama_mixture(**fields))
    assert (report.router_scope, len(report.routers)) == (scope, routers)
    assert report.experts == ["E0", "E1", "E2"]
    tokens = sum(domain.tokens for domain in report.domains)
    assert {router.tokens for router in report.routers} == {tokens}
    assert RoutingReport.from_json(report.to_json()) == report


def test_fixed_weights_are_the_same_for_all() -> None:
    model = llama_mixture(router_type="fixed", fixed_routing_weights=[0.5, 0.25, 0.25])
    report = report_of(model)
    assert report.router_scope == "fixed"
    assert report.load == [0.5, 0.25, 0.25]
    assert report.information.observed == 0.0
    assert any("fixed" in note for note in report.notes)


def test_mixtures_side_by_side_are_one_set_of_experts() -> None:
    model = llama_mixture()
    model.add_adapter("second", mixture_config(num_experts=2, target_modules=["q_proj"]))
    perturb(model)
    model.base_model.set_adapter(["second", "default"])
    report = report_of(model.eval())
    names = ["second.0", "second.1", "default.0", "default.1", "default.2"]
    assert report.experts == names
    columns = {router.label.split(".")[-1]: router.experts for router in report.routers}
    assert columns == {"q_proj": [0, 1, 2, 3, 4], "v_proj": [2, 3, 4], "down_proj": [2, 3, 4]}


def test_experts_that_joined_one_by_one_have_the_names_of_their_adapters() -> None:
    alone = {"num_experts": 1, "joins_mixture": True, "top_k_experts": 1}
    model = mixture(tiny_llama(), name="sql", **alone)
    model.add_adapter("french", mixture_config(**alone))
    perturb(model)
    model.base_model.set_adapter(["french", "sql"])
    report = report_of(model.eval())
    assert report.experts == ["french", "sql"]
    assert sum(report.load) == pytest.approx(1.0, abs=1e-5)
    model.base_model.set_adapter("sql")
    with pytest.raises(ReportError, match="None of the active adapters"):
        report_of(model)


def test_a_tokenizers_limit_counts_too() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.model_max_length = 10
    report = routing_report(llama_mixture(), tokenizer, {"a": ["abc " * 9]})
    assert report.settings["max_length"] == 10
    assert report.domains[0].passages == 4


def test_a_fixed_mixture_and_a_plain_adapter_beside_a_learned_one_are_noted() -> None:
    model = llama_mixture()
    model.add_adapter("even", mixture_config(num_experts=2, router_type="fixed"))
    model.add_adapter("plain", lora_config())
    model.base_model.set_adapter(["default", "even", "plain"])
    notes = " ".join(report_of(model.eval()).notes)
    assert "even has fixed weights [0.5, 0.5]" in notes
    assert "plain" in notes


class Own(nn.Module):
    """A router that is not ours: by the sign of one feature, negative weights too."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        first = (hidden_states[..., :1] > 0).to(hidden_states.dtype)
        return torch.cat([first, -(1 - first)], dim=-1)


@pytest.mark.parametrize("router", [Router(32, 2, top_k=1), Own()])
@pytest.mark.parametrize("automatic", [True, False])
def test_attached_routers_are_reported_asked_or_by_themselves(
    router: nn.Module, automatic: bool
) -> None:
    model = two_loras(tiny_llama()).eval()
    config = MoELoraConfig(num_experts=2, top_k_experts=1) if automatic else None
    model.attach_router(copy.deepcopy(router), config)
    report = report_of(model)
    assert report.router_scope == "attached"
    assert report.experts == ["first", "second"]
    assert any("does not route by itself" in note for note in report.notes) is not automatic
    assert report.routers[0].token_entropy == 0.0
    assert sum(report.load) == pytest.approx(1.0)


def test_an_attached_router_is_asked_about_the_models_own_hidden_states() -> None:
    model = two_loras(tiny_llama()).eval()
    model.attach_router(Own())
    report = report_of(model, {"a": ["abcdefgh"]})
    with torch.no_grad(), model.disable_adapter():
        ids = torch.tensor([TOKENIZER("abcdefgh").input_ids])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    share = (hidden[0, :, 0] > 0).double().mean().item()
    assert report.load[0] == pytest.approx(share, abs=1e-6)


def test_gpt2_is_reported_up_to_its_positions() -> None:
    model = mixture(tiny_gpt2(), target_modules=["c_attn", "c_proj"]).eval()
    report = report_of(model, {"a": ["abc " * 60]}, max_length=500)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert report.settings["max_length"] == 64
    assert report.domains[0].passages == 4


def test_an_encoder_decoder_model_says_what_each_router_reads() -> None:
    model = mixture(tiny_t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM").eval()
    report = report_of(model)
    reads = {router.name: router.reads for router in report.routers}
    assert reads["encoder.block.1.layer.0.SelfAttention.q"] == "encoder tokens"
    assert reads["decoder.block.1.layer.0.SelfAttention.q"] == "decoder tokens"
    assert reads["decoder.block.1.layer.1.EncDecAttention.q"] == "decoder tokens"
    assert reads["decoder.block.1.layer.1.EncDecAttention.v"] == "encoder tokens"
    assert [layer.name for layer in report.layers] == [
        "encoder 0",
        "encoder 1",
        "decoder 0",
        "decoder 1",
    ]
    view = report.token_views[0].tokens
    assert view["decoder tokens"][1:] == view["encoder tokens"][:-1]
    assert any("shifted right" in note for note in report.notes)


def test_only_the_named_layers_are_reported(report: RoutingReport) -> None:
    some = report_of(llama_mixture(), layers=[1])
    assert [layer.name for layer in some.layers] == ["1"]
    assert [router.name for router in some.routers] == [r.name for r in report.routers[3:]]
    assert some.routers[0].load == report.routers[3].load


def test_a_layer_that_decides_over_something_else_is_left_out_and_named() -> None:
    model = mixture(
        tiny_t5(), target_modules=["q", "relative_attention_bias"], task_type="SEQ_2_SEQ_LM"
    ).eval()
    report = report_of(model)
    assert not any("relative" in router.name for router in report.routers)
    assert any("relative_attention_bias" in note for note in report.notes)


def test_similarity_is_the_cosine_of_the_whole_updates() -> None:
    model = llama_mixture(target_modules=["v_proj"])
    report = report_of(model)
    updates = []
    for layer in model.get_base_model().model.layers:
        module = layer.self_attn.v_proj
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        updates.append(
            [(b[:, 2 * e : 2 * e + 2] @ a[2 * e : 2 * e + 2]).flatten() for e in range(3)]
        )
    for router, experts in zip(report.routers, updates, strict=True):
        assert router.similarity[0][2] == pytest.approx(
            torch.cosine_similarity(experts[0], experts[2], dim=0).item(), abs=2e-6
        )
    whole = [torch.cat([experts[e] for experts in updates]) for e in range(3)]
    expected = torch.cosine_similarity(whole[0], whole[1], dim=0).item()
    assert report.similarity[0][1] == pytest.approx(expected, abs=2e-6)


def test_a_fresh_mixture_has_no_similarity() -> None:
    model = get_peft_model(tiny_llama(), mixture_config()).eval()
    report = report_of(model)
    assert report.similarity == [[None] * 3] * 3


def test_the_model_is_left_as_it_was() -> None:
    model = llama_mixture(expert_dropout=0.5, expert_capacity_factor=1.0).train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = report_of(model), report_of(model)
    assert first == second
    assert [module.training for module in model.modules()] == modes


def test_memory_does_not_grow_with_the_text_and_reading_stops() -> None:
    def endless() -> Any:
        while True:
            yield "abc def "

    report = report_of(llama_mixture(), {"a": endless(), "b": ["x"] * 8}, max_tokens=100)
    assert report.domains[0].tokens == 100
    assert not report.domains[0].complete
    assert report.domains[1].complete


def test_of_many_routers_the_clearest_of_each_layer_is_shown(
    monkeypatch: pytest.MonkeyPatch, report: RoutingReport
) -> None:
    monkeypatch.setattr(job, "MOST_SHOWN", 5)
    some = report_of(llama_mixture())
    assert len(some.shown) == 2
    for layer, index in enumerate(some.shown):
        of_layer = [r for r in some.routers if r.layer == layer]
        best = max(of_layer, key=lambda router: router.information.observed)
        assert some.routers[index] is best
    assert some.routers == report.routers


def test_tokens_are_shown_with_their_shares(report: RoutingReport) -> None:
    view = report.token_views[1]
    assert "".join(view.tokens["tokens"]) == ("hello wörld " * 4)[:15]
    weights = by_hand(llama_mixture(), report.routers[0].name, DOMAINS["lower"][:1], max_length=16)
    expected = (100 * weights[: len(view.tokens["tokens"])]).round()
    assert view.weights[0] == expected.int().tolist()


def test_nan_weights_are_refused() -> None:
    model = llama_mixture()
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_router["default"].weight[0] = (
            float("nan")
        )
    with pytest.raises(ReportError, match="NaN or infinity"):
        report_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_length": True}, "max_length must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"permutations": 0}, "permutations must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"layers": [2]}, r"layers must be .*0 to 1, got \[2\]"),
        ({"layers": []}, r"layers must be .*got \[\]"),
        ({"expert_names": ["a", "b"]}, "expert_names must be 3 different names"),
        ({"expert_names": ["a", "a", "b"]}, "expert_names must be 3 different names"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with unchecked_types(), pytest.raises(ReportError, match=message):
        report_of(llama_mixture(), **options)


def test_models_without_routing_are_refused() -> None:
    plain = get_peft_model(tiny_llama(), lora_config())
    with pytest.raises(ReportError, match="None of the active adapters"):
        report_of(plain)
    with pytest.raises(ReportError, match="has no LoRA adapters"):
        report_of(tiny_llama())
    model = llama_mixture()
    with model.disable_adapter(), pytest.raises(ReportError, match="are disabled"):
        report_of(model)
    fixed = llama_mixture(router_type="fixed")
    fixed.merge_adapter()
    with pytest.raises(ReportError, match="are merged"):
        report_of(fixed)


def test_a_variant_has_no_similarity_and_says_so() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(use_dora=True, target_modules=["q_proj"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["a", "b"])
    model.attach_router(Own())
    report = report_of(model.eval())
    assert report.similarity is None
    assert any("more than pairs of A and B" in note for note in report.notes)
