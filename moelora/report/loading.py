"""Loading a saved mixture with its base model and tokenizer, for the command line."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from moelora import _peft
from moelora.errors import MoELoraError, ReportError
from moelora.router_file import ATTACHED, ROUTER_FILE, is_ours, read_router_file

DTYPES = ("auto", "float32", "bfloat16", "float16")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Loaded:
    """A routed model, ready to run.

    Attributes:
        model: in evaluation mode.
        tokenizer: the adapter's own, or its base model's.
        name: of the mixture.
        expert_names: as its router file tells them; None where it only numbers them.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    expert_names: list[str] | None


def load_mixture(
    sources: Sequence[str],
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> Loaded:
    """Load mixtures, or adapters with their attached router, onto a base model.

    Args:
        sources: adapter folders or hub ids, which become active together; a folder that holds
            several adapters in folders of their own stands for all of them.
        base: the base model's folder or hub id; None takes the one that the first adapter names.
        device: where to run.
        dtype: of the base model; ``"auto"`` is the one it was saved in.

    Raises:
        ReportError: if something cannot be loaded; the message holds the first line of why.
        CheckpointError: if an adapter is damaged.
    """
    where = _device(device)
    adapters = [adapter for source in sources for adapter in _adapters(source)]
    names = [name for name, _ in adapters]
    if len(set(names)) < len(names):
        raise ReportError(f"Adapters must have different names, got {names}.")
    with _told("adapter", adapters[0][1]):
        config = _peft.PeftConfig.from_pretrained(adapters[0][1])
    base = base or config.base_model_name_or_path
    if not base:
        raise ReportError(f"{adapters[0][1]} names no base model: name it with --base.")
    with _told("base model", base):
        model = _auto_class(base, config.task_type).from_pretrained(
            base, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    with _told("adapter", adapters[0][1]):
        routed: Any = _peft.PeftModel.from_pretrained(model, adapters[0][1], adapter_name=names[0])
    for name, folder in adapters[1:]:
        with _told("adapter", folder):
            routed.load_adapter(folder, adapter_name=name)
    if len(names) > 1:
        routed.base_model.set_adapter(names)
    with _told("model", base):
        routed.to(where)
    return Loaded(
        model=routed.eval(),
        tokenizer=_tokenizer(sources[0], base),
        name=" + ".join(Path(source).name for source in sources),
        expert_names=_expert_names(adapters),
    )


@contextmanager
def _told(what: str, name: str) -> Iterator[None]:
    """Turn what libraries raise for a bad file or name into one line of ours."""
    try:
        yield
    except MoELoraError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReportError(f"The {what} {name} cannot be loaded: {lines[0]:.300}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ReportError(f"--device {name} is not available: {reason}") from error
    return device


def _adapters(source: str) -> list[tuple[str, str]]:
    """Names and places of the adapters that a folder or hub id stands for."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise ReportError(f"{source} is neither a folder nor a hub id (owner/name).")
        return [(folder.name.replace(".", "-"), source)]
    alone = (folder / _peft.CONFIG_NAME).is_file()
    inside = {p.parent.name: str(p.parent) for p in sorted(folder.glob(f"*/{_peft.CONFIG_NAME}"))}
    file = folder / ROUTER_FILE
    if file.is_file() and is_ours(file) and (router := read_router_file(file)).kind == ATTACHED:
        # the experts in the router's order; one named "default" lies beside its file
        found = {**inside, **({"default": source} if alone else {})}
        missing = [name for name in router.experts if name not in found]
        if missing:
            raise ReportError(
                f"{file} routes over {router.experts}, of which {missing} are missing."
            )
        return [(name, found[name]) for name in router.experts]
    if alone:
        return [(folder.resolve().name.replace(".", "-"), source)]
    if not inside:
        raise ReportError(f"{source} holds no {_peft.CONFIG_NAME}, so it is no adapter.")
    return list(inside.items())


def _auto_class(base: str, task_type: Any) -> Any:
    name = _AUTO_CLASSES.get(str(getattr(task_type, "value", task_type)))
    if name is None:
        config = AutoConfig.from_pretrained(base)
        architectures = getattr(config, "architectures", None) or []
        if config.is_encoder_decoder:
            name = _AUTO_CLASSES["SEQ_2_SEQ_LM"]
        elif architectures and isinstance(getattr(transformers, architectures[0], None), type):
            name = architectures[0]
        else:
            name = _AUTO_CLASSES["CAUSAL_LM"]
    return getattr(transformers, name)


def _tokenizer(source: str, base: str) -> PreTrainedTokenizerBase:
    own = Path(source) / "tokenizer_config.json"
    place = source if own.is_file() else base
    with _told("tokenizer", place):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    return tokenizer


def _expert_names(adapters: Sequence[tuple[str, str]]) -> list[str] | None:
    """The experts' names from a mixture's router file, unless they only number them."""
    if len(adapters) > 1:
        return None
    file = Path(adapters[0][1]) / ROUTER_FILE
    if not file.is_file() or not is_ours(file):
        return None
    names = read_router_file(file).experts
    return None if any(re.fullmatch(r".*\.\d+", name) for name in names) else names
