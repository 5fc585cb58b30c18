"""Pipelines, streaming and continuous batching: text in, the text of plain greedy decoding out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from moelora import RoutingWeightsError, UnsupportedLayerError
from tests.generation.test_decoding import attached
from tests.generation.words import PROMPTS, word_tokenizer
from tests.lm import VOCABULARY, explicit_weights, mixture, mixture_config, perturb, tiny_llama
from tests.models import bert_config

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

MODELS: dict[str, Callable[[], PeftModel]] = {
    "module": lambda: mixture(tiny_llama(dtype=torch.float32)),
    "layer": lambda: mixture(tiny_llama(dtype=torch.float32), router_scope="layer"),
    "model": lambda: mixture(tiny_llama(dtype=torch.float32), router_scope="model"),
    "attached": lambda: attached().float(),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def alone(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Greedy new tokens of one prompt, one uncached forward after the other."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        # as min_new_tokens does nothing without an end token, token 0 is as good as any
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    tokens: list[int] = ids[0, length:].tolist()
    return tokens


def text_alone(model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    return tokenizer.decode(alone(model, tokenizer, prompt), skip_special_tokens=True)


# Pipelines -------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_writes_what_each_prompt_gives_alone(batch_size: int, kind: str) -> None:
    model, tokenizer = MODELS[kind]().eval(), word_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    outputs = generate(PROMPTS, batch_size=batch_size, return_full_text=False, **GREEDY)
    found = [output[0]["generated_text"].split() for output in outputs]
    assert found == [text_alone(model, tokenizer, prompt).split() for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["module", "layer", "model"])
def test_a_pipeline_starts_from_the_folder_of_a_saved_mixture(kind: str, tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    model = MODELS[kind]().eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "mixture")
    generate = pipeline("text-generation", model=str(tmp_path / "mixture"))
    (output,) = generate(PROMPTS[2], return_full_text=False, **GREEDY)
    assert output["generated_text"].split() == text_alone(model, tokenizer, PROMPTS[2]).split()


def test_a_classification_pipeline_scores_as_the_model_does() -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(bert_config(vocab_size=VOCABULARY))
    config = mixture_config(task_type="SEQ_CLS", target_modules=["query", "value"])
    model, tokenizer = get_peft_model(base, config).eval(), word_tokenizer("right")
    perturb(model)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for prompt, scores in zip(PROMPTS, classify(PROMPTS, batch_size=3), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].softmax(-1)
        by_label = {entry["label"]: entry["score"] for entry in scores}
        found = [by_label[f"LABEL_{label}"] for label in range(3)]
        assert found == pytest.approx(expected.tolist(), rel=1e-5)


# Streaming -------------------------------------------------------------------------------------


@EVERY_MODEL
def test_a_streamer_prints_what_greedy_decoding_gives(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = MODELS[kind]().eval(), word_tokenizer()
    inputs = tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    expected = tokenizer.decode(alone(model, tokenizer, PROMPTS[1]))
    assert capsys.readouterr().out.split() == expected.split()


@EVERY_MODEL
def test_text_is_read_piece_by_piece_while_a_thread_generates(kind: str) -> None:
    model, tokenizer = MODELS[kind]().eval(), word_tokenizer()
    inputs = tokenizer(PROMPTS[2], return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {**inputs, **GREEDY, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options, daemon=True)
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = tokenizer.decode(alone(model, tokenizer, PROMPTS[2]))
    assert len(pieces) > 1
    assert "".join(pieces).split() == expected.split()


def test_streaming_takes_explicit_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = MODELS["module"]().eval(), word_tokenizer()
    inputs = tokenizer(PROMPTS[2], return_tensors="pt", return_token_type_ids=False)
    options = {**inputs, **GREEDY, "routing_weights": explicit_weights(1, 6, 3)}
    expected = tokenizer.decode(model.generate(**options)[0, 6:])
    model.generate(streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out.split() == expected.split()


# Continuous batching ---------------------------------------------------------------------------

# as much memory as the prompts need: by itself it takes most of the machine's
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
NO_END = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)


def continuously(model: Any, **options: Any) -> list[list[int]]:
    """New tokens of each prompt, by ``generate_batch``."""
    inputs = [word_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    outputs = model.generate_batch(
        inputs=inputs, generation_config=NO_END, continuous_batching_config=SMALL, **options
    )
    assert [output.error for output in outputs.values()] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("kind", ["module", "layer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_gives_what_each_prompt_gives_alone(attention: str, kind: str) -> None:
    model, tokenizer = MODELS[kind]().eval(), word_tokenizer()
    expected = [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    model.get_base_model().set_attn_implementation(attention)
    assert continuously(model) == expected
    assert continuously(model.get_base_model(), routing_weights=None) == expected


@pytest.mark.parametrize("kind", ["model", "attached"])
def test_continuous_batching_refuses_a_router_of_the_whole_model(kind: str) -> None:
    model = MODELS[kind]().eval()
    with pytest.raises(UnsupportedLayerError, match="cannot serve a router that reads the final"):
        continuously(model)
    with pytest.raises(UnsupportedLayerError, match="cannot serve a router that reads the final"):
        model.init_continuous_batching(generation_config=NO_END)


@pytest.mark.parametrize("kind", ["model", "attached"])
def test_continuous_batching_serves_the_base_while_adapters_are_off(kind: str) -> None:
    model, tokenizer = MODELS[kind]().eval(), word_tokenizer()
    with model.disable_adapter():
        expected = [alone(model, tokenizer, prompt) for prompt in PROMPTS]
        assert continuously(model) == expected


def test_continuous_batching_refuses_explicit_weights() -> None:
    model = MODELS["module"]().eval()
    with pytest.raises(RoutingWeightsError, match=r"generate_batch\(\) packs tokens"):
        continuously(model, routing_weights=torch.ones(3))
