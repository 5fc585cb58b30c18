"""Tiny mixtures with a byte tokenizer, three toy domains, and a report made up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from moelora.report.results import (
    DomainSummary,
    Information,
    LayerReport,
    RouterReport,
    RoutingReport,
    TokenView,
    TrainingLoads,
)
from tests.demo.tiny import tiny_llama, tiny_tokenizer
from tests.lm import mixture

TOKENIZER = tiny_tokenizer()
DOMAINS = {
    "upper": ["HELLO WORLD " * 5, "ABC"] * 6,
    "lower": ["hello wörld " * 4, "x"] * 7,
    "digits": ["1 2 3 4 " * 3] * 9,
}


def llama_mixture(**fields: Any) -> PeftModel:
    return mixture(tiny_llama(), **fields).eval()


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=257,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def made_up(*, nasty: str = "x", domains: int = 2) -> RoutingReport:
    """Two routers over three experts; ``nasty`` is in every foreign text."""
    names = [f"{letter} {nasty}" for letter in "abc"[:domains]]
    chance = Information(0.4, 0.01, 0.02) if domains > 1 else None
    rows = [[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]][:domains]
    router = RouterReport(
        name=f"model.layers.0.{nasty}",
        label=f"layer 0 {nasty}",
        layer=0,
        reads="tokens",
        experts=[0, 1, 2],
        tokens=20,
        load=[0.4, 0.25, 0.35],
        served=[0.8, 0.5, 0.7],
        domain_load=rows,
        shuffled_load=rows[::-1] if domains > 1 else None,
        information=chance,
        token_entropy=0.9,
        load_entropy=1.5,
        coactivation=[[0.8, 0.3, 0.5], [0.3, 0.5, 0.2], [0.5, 0.2, 0.7]],
        similarity=[[1.0, -0.5, None], [-0.5, 1.0, None], [None, None, None]],
        by_position=[[0.4, 0.25, 0.35], None],
        by_order=[[0.2, 0.3, 0.5]] * domains,
    )
    other = replace(
        router,
        name="model.layers.1",
        label="layer 1",
        layer=1,
        experts=[0, 2],
        load=[0.5, 0.5],
        served=[1.0, 1.0],
        domain_load=[[0.5, 0.5]] * domains,
        shuffled_load=[[0.5, 0.5]] * domains if domains > 1 else None,
        coactivation=[[1.0, 1.0], [1.0, 1.0]],
        similarity=None,
        by_position=[[0.5, 0.5], None],
        by_order=[[0.5, 0.5]] * domains,
    )
    layer = LayerReport(f"0 {nasty}", [0.4, 0.25, 0.35], 0.9, 1.5, chance)
    view = [[[60, 40, 0], [0, 0, 100]], [[50, 50], [100, 0]]]
    return RoutingReport(
        model=f"M {nasty}",
        experts=[f"E{number} {nasty}" for number in range(3)],
        router_scope="module",
        domains=[DomainSummary(name, nasty, 3, 4, 10, False) for name in names],
        routers=[router, other],
        layers=[layer, replace(layer, name="1")],
        load=[0.45, 0.125, 0.425],
        domain_load=rows,
        shuffled_load=rows if domains > 1 else None,
        information=chance,
        positions=["0 to 3", "4 to 7"],
        order=list(range(domains)),
        similarity=[[1.0, 0.25, 0.0], [0.25, 1.0, 0.5], [0.0, 0.5, 1.0]],
        training=TrainingLoads([10, 20], [[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]),
        shown=[0, 1],
        token_views=[TokenView(name, {"tokens": [nasty, ""]}, view) for name in names],
        settings={"layers": None, "permutations": 20, "seed": 0, "nasty": nasty},
        notes=[nasty],
    )
