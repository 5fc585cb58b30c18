"""What ``accelerate launch`` starts in the tests: ``train.py`` twice, the second time resuming.

    launched.py FOLDER ARGUMENTS_OF_TRAIN...

The first run goes to the end, with a checkpoint on the way. The second starts from that checkpoint
in a folder of its own. Both in one start, since starting processes is most of a test's time.
``logits.safetensors`` holds what the trained model, still distributed, answers.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import accelerate.state
import torch
import torch.distributed as dist
import transformers.trainer
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState

TRAIN = Path(__file__).resolve().parents[2] / "examples" / "distributed" / "train.py"
IDS = torch.arange(1, 17).reshape(2, 8)


def allow_fsdp_on_cpu() -> None:
    """Accelerate takes FSDP for DDP on CPUs, though torch's FSDP2 runs there: tell it not to.

    All that follows (sharding, the optimizer, saving, resuming) is accelerate's and torch's own.
    """
    original = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


def without_compiler() -> None:
    """On CPUs DeepSpeed compiles a faster all-reduce when it starts; without it, it uses gloo."""
    # only where it is asked for: it need not be installed
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(out: Path, *arguments: str) -> None:
    """Run the example in this process."""
    sys.argv = [str(TRAIN), "--out", str(out), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


class KeepLogits(TrainerCallback):
    """What the trained model answers while it is still distributed, as it was trained."""

    logits: ClassVar[list[torch.Tensor]] = []

    def on_step_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Ask the model after the last step, on every rank alike."""
        if state.global_step == state.max_steps:
            model.eval()
            with torch.no_grad():
                self.logits.append(model(input_ids=IDS).logits.float())
            model.train()


def main() -> None:
    """Train, resume, and leave what the model answers."""
    folder, *arguments = sys.argv[1:]
    out, resumed = Path(folder) / "out", Path(folder) / "resumed"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_compiler()
    transformers.trainer.DEFAULT_CALLBACKS.append(KeepLogits)
    train(out, *arguments)
    if dist.get_rank() == 0:
        save_file({"logits": KeepLogits.logits[0]}, Path(folder) / "logits.safetensors")
        shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
    dist.barrier()
    train(resumed, "--resume", *arguments)


if __name__ == "__main__":
    main()
