"""What ``docs/distributed.md`` leaves."""

from __future__ import annotations

import torch.distributed as dist

import moelora
from tests.docs.blocks import After


def check_the_gathered_mixture_is_whole(after: After) -> None:
    told = moelora.describe(after.folder / "gathered")
    assert len(told.experts) == 8
    assert told.router is not None
    assert (after.folder / "gathered" / "router.safetensors").is_file()


def check_no_process_group_is_left(after: After) -> None:
    assert "sharded" in after.names
    assert not dist.is_initialized()


def check_the_loaded_mixture_is_one(after: After) -> None:
    assert isinstance(after.names["model"].peft_config["default"], moelora.MoELoraConfig)
