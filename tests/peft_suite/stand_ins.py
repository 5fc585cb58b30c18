"""Tiny stand-ins for the hub's models that PEFT's tests name, laid out as the hub's own cache.

``HF_HUB_CACHE`` on the folder and ``HF_HUB_OFFLINE=1`` are then all it takes: ``from_pretrained``,
``PeftModel.from_pretrained`` and ``hf_hub_download`` find them under their usual names. Weights are
random and seeded; sizes are those of the originals where tests rely on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
_LLAMA = _TINY | {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 4}
_GEMMA = _LLAMA | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_BERT = _TINY | {"hidden_size": 32, "intermediate_size": 37}
_POSITIONS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1024}
_OPT = _TINY | {"word_embed_proj_dim": 16, "ffn_dim": 4, "max_position_embeddings": 128}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "vocab_size": 1024,
}

#: recipe: (model type, configuration)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", _BART | {"max_position_embeddings": 128}),
    "bert": ("bert", _BERT),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1024}),
    "clip": ("clip_text_model", _BERT),
    "deberta": ("deberta", _BERT | _POSITIONS),
    "deberta-v2": ("deberta-v2", _BERT | _POSITIONS),
    "falcon_mamba": ("falcon_mamba", _TINY),
    "gemma3": ("gemma3_text", _GEMMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _TINY | {"intermediate_size": 37}),
    "gpt_oss": ("gpt_oss", _GEMMA | _EXPERTS),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4, "n_positions": 512}),
    "llama": ("llama", _LLAMA | {"pad_token_id": 0}),
    "llama4": (
        "llama4_text",
        _LLAMA | _EXPERTS | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    ),
    "mistral": ("mistral", _LLAMA),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS),
    # the default spread is so small that adapters hardly change what so narrow a model generates.
    "opt": ("opt", _OPT | {"num_hidden_layers": 5, "vocab_size": 50265, "init_std": 0.06}),
    # tests rely on its width and on its twelve layers; the rest is small.
    "opt-125m": (
        "opt",
        _OPT
        | {"hidden_size": 768, "word_embed_proj_dim": 768}
        | {"num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "qwen3_moe": (
        "qwen3_moe",
        _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "resnet": (
        "resnet",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
        | {"num_labels": 3},
    ),
    "roberta": ("roberta", _BERT),
    "t5": (
        "t5",
        {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        | {"vocab_size": 1103, "decoder_start_token_id": 0},
    ),
    "whisper": (
        "whisper",
        _BART
        | {"max_source_positions": 30, "max_target_positions": 40}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
    ),
}

_CAUSAL, _SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_SEQUENCE = "AutoModelForSequenceClassification"
# loaded as causal models and as headless ones, and neither should find weights missing.
_PRETRAINING = "AutoModelForPreTraining"

#: name on the hub, a revision behind @: (class to make it with, recipe)
MODELS: dict[str, tuple[str, str]] = {
    "bert-base-uncased": (_PRETRAINING, "bert"),
    "facebook/opt-125m": (_CAUSAL, "opt-125m"),
    "google/flan-t5-small": (_SEQ2SEQ, "t5"),
    "gpt2": (_CAUSAL, "gpt2"),
    "hf-internal-testing/Mixtral-tiny": (_CAUSAL, "mixtral"),
    "hf-internal-testing/tiny-random-BertModel": (_PRETRAINING, "bert"),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (_CAUSAL, "gemma3"),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, "llama"),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (_CAUSAL, "mistral"),
    "hf-internal-testing/tiny-random-gpt2": (_CAUSAL, "gpt2"),
    "openai-community/gpt2": (_CAUSAL, "gpt2"),
    "peft-internal-testing/opt-125m": (_CAUSAL, "opt-125m"),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", "clip"),
    "peft-internal-testing/tiny-dummy-qwen2": (_CAUSAL, "qwen2"),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (_SEQ2SEQ, "bart"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (_SEQUENCE, "bert"),
    "peft-internal-testing/tiny-random-BertModel": (_PRETRAINING, "bert"),
    "peft-internal-testing/tiny-random-BertModel@v2.0.0": (_PRETRAINING, "bert"),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (_CAUSAL, "bloom"),
    "peft-internal-testing/tiny-random-DebertaModel": ("AutoModel", "deberta"),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("AutoModel", "deberta-v2"),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (_CAUSAL, "gpt2"),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (_CAUSAL, "gptj"),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (_CAUSAL, "gpt_neox"),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, "llama"),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (_CAUSAL, "opt"),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "AutoModelForImageClassification",
        "resnet",
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (_SEQUENCE, "roberta"),
    "peft-internal-testing/tiny-random-RobertaModel": ("AutoModel", "roberta"),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (_SEQ2SEQ, "t5"),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (_SEQ2SEQ, "t5"),
    "peft-internal-testing/tiny-random-gpt2": (_CAUSAL, "gpt2"),
    "peft-internal-testing/tiny-random-t5": (_SEQ2SEQ, "t5"),
    # no test names it: the base of an adapter below.
    "peft-internal-testing/tiny-whisper": ("WhisperForConditionalGeneration", "whisper"),
    "tiiuae/falcon-mamba-tiny-dev": (_CAUSAL, "falcon_mamba"),
    "trl-internal-testing/tiny-GptOssForCausalLM": (_CAUSAL, "gpt_oss"),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (_CAUSAL, "llama4"),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (_SEQUENCE, "llama"),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": (_CAUSAL, "qwen2"),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (_CAUSAL, "qwen3"),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (_CAUSAL, "qwen3_moe"),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (_CAUSAL, "llama"),
}

_OURS = "peft-internal-testing/"
_TINY_OPT = _OURS + "tiny-random-OPTForCausalLM"

#: name on the hub: (base model, class to load it with, task type)
ADAPTERS: dict[str, tuple[str, str, str | None]] = {
    _OURS + "gpt2-lora-random": ("openai-community/gpt2", _CAUSAL, "CAUSAL_LM"),
    _OURS + "opt-125m-dummy-lora": ("facebook/opt-125m", _CAUSAL, "CAUSAL_LM"),
    _OURS + "tiny-OPTForCausalLM-lora": (_TINY_OPT, _CAUSAL, "CAUSAL_LM"),
    _OURS + "tiny-opt-lora-revision@test": (_TINY_OPT, _CAUSAL, "CAUSAL_LM"),
    _OURS + "tiny-random-BertModel-lora@v1.2.3": (
        "hf-internal-testing/tiny-random-BertModel",
        _CAUSAL,
        "CAUSAL_LM",
    ),
    _OURS + "tiny_GPT2ForTokenClassification-lora": (
        _OURS + "tiny-random-GPT2LMHeadModel",
        "AutoModelForTokenClassification",
        "TOKEN_CLS",
    ),
    _OURS + "tiny_OPTForFeatureExtraction-lora": (_TINY_OPT, "AutoModel", "FEATURE_EXTRACTION"),
    _OURS + "tiny_OPTForQuestionAnswering-lora": (
        _TINY_OPT,
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    _OURS + "tiny_OPTForSequenceClassification-lora": (_TINY_OPT, _SEQUENCE, "SEQ_CLS"),
    _OURS + "tiny_T5ForSeq2SeqLM-lora": (_OURS + "tiny-random-t5", _SEQ2SEQ, "SEQ_2_SEQ_LM"),
    _OURS + "tiny_WhisperForConditionalGeneration-lora": (
        _OURS + "tiny-whisper",
        "WhisperForConditionalGeneration",
        None,
    ),
}


def make_all(cache: Path) -> None:
    """Fill ``cache`` with every stand-in; what an earlier call finished stays."""
    tokenizer = _tokenizer()
    for name, (class_name, recipe) in MODELS.items():
        for folder in _new_snapshot(cache, name):
            _model(class_name, recipe).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if recipe == "resnet":
                size = {"shortest_edge": 224}
                processor = {"image_processor_type": "ConvNextImageProcessor", "size": size}
                (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for folder in _new_snapshot(cache, "hf-internal-testing/tiny-sd-pipe"):
        _stable_diffusion(tokenizer).save_pretrained(folder)
    for name, (base, class_name, task) in ADAPTERS.items():
        for folder in _new_snapshot(cache, name):
            model = getattr(transformers, class_name).from_pretrained(_snapshot(cache, base))
            config = LoraConfig(
                task_type=task, target_modules=None if task else ["q_proj"], init_lora_weights=False
            )
            model = get_peft_model(model, config)
            config.base_model_name_or_path = base
            model.save_pretrained(folder)


def _model(class_name: str, recipe: str) -> transformers.PreTrainedModel:
    model_type, fields = RECIPES[recipe]
    config = AutoConfig.for_model(model_type, **fields)
    model_class = getattr(transformers, class_name)
    return getattr(model_class, "from_config", model_class)(config).eval()


def _stable_diffusion(tokenizer: PreTrainedTokenizerFast) -> diffusers.StableDiffusionPipeline:
    widths = (32, 64)
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=2,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=widths[0],
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        text_encoder=_model("CLIPTextModel", "clip"),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges: any text in fewer than 400 ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # 77 is the shortest of the models' limits, CLIP's.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **special)


def _snapshot(cache: Path, name: str) -> Path:
    commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    repository = name.partition("@")[0].replace("/", "--")
    return cache / f"models--{repository}" / "snapshots" / commit


def _new_snapshot(cache: Path, name: str) -> Iterator[Path]:
    """The seeded turn to write a model, none if it is there. The reference is written last."""
    snapshot = _snapshot(cache, name)
    reference = snapshot.parents[1] / "refs" / (name.partition("@")[2] or "main")
    if reference.exists():
        return
    shutil.rmtree(snapshot, ignore_errors=True)
    snapshot.mkdir(parents=True)
    torch.manual_seed(zlib.crc32(name.encode()))
    yield snapshot
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(snapshot.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    make_all(parser.parse_args().cache)
