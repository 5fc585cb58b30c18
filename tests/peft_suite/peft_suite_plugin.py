"""A pytest plugin for PEFT's own tests: no network, two data sets made up, the rows we look at.

PEFT's ``hub_online_once`` goes online on purpose for a first access, and its image and its text
come from the hub. Both are replaced where all test modules find them, before any is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

#: Set in the run without moelora, which must not have it.
STOCK_VARIABLE = "PEFT_SUITE_STOCK"

#: Rows of other methods than LoRA in the grids of methods by models.
OTHER_METHODS = re.compile(
    r"test_(decoder|encoder_decoder|feature_extraction)_models\.py.*[\[-](?!(Ada)?Lora)\w+Config"
    r"|test_(seq_classifier|stablediffusion)\.py.*[\[-](?!(Ada)?Lora)\w+Config"
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Replace what goes online; the tests' root is known and nothing is collected yet."""
    if ("moelora" in sys.modules) == (STOCK_VARIABLE in os.environ):
        raise pytest.UsageError("moelora is in the run without it, or missing in the other.")
    testing_utils = importlib.import_module("tests.testing_utils")
    testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()
    testing_utils.load_dataset = _load_dataset
    importlib.import_module("peft.utils.save_and_load").check_file_exists_on_hf_hub = _is_in_cache


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what deselected.txt lists, and other methods' rows of the grids."""
    prefixes = tuple(read_deselected())
    keep, drop = [], []
    for item in items:
        test_id = item.nodeid.removeprefix("tests/")
        is_dropped = test_id.startswith(prefixes) or OTHER_METHODS.match(test_id)
        (drop if is_dropped else keep).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


def read_deselected() -> dict[str, str]:
    """The start of a test's id -> why it is left out."""
    listed, reason = {}, ""
    for line in Path(__file__).with_name("deselected.txt").read_text().splitlines():
        if line.startswith("#"):
            reason = line.lstrip("# ")
        elif line:
            listed[line] = reason
    return listed


def _is_in_cache(repo_id: str, filename: str, **kwargs: Any) -> bool:
    """What the hub would answer; offline PEFT does not ask and takes another path."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, filename), str)


def _load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "ybelkada/english_quotes_copy":
        from datasets import Dataset, DatasetDict

        quotes = [f"{n} green bottles hang on the wall." for n in range(64)]
        return DatasetDict({"train": Dataset.from_dict({"quote": quotes})})
    if name == "huggingface/cats-image":
        from PIL import Image

        return {"test": {"image": [Image.effect_noise((64, 48), 50).convert("RGB")]}}
    raise ConnectionError(f"No stand-in for the data set {name!r}.")
