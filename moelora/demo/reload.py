"""Loading a saved mixture in a new process: same logits, and texts written with it.

``python -m moelora.demo.reload FOLDER`` answers the request that `reload_in_new_process` put into
the folder. Tensors travel as safetensors, the rest as JSON.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moelora._peft import PeftModel
from moelora.demo.batches import Batch, Encoded
from moelora.demo.errors import DemoError
from moelora.demo.model import Base, load_base

REQUEST, PROBE, ANSWER = "request.json", "probe.safetensors", "answer.json"
NEW_TOKENS = 48


@dataclass(frozen=True)
class Written:
    """What the frozen base and the mixture wrote for one prompt."""

    base: str
    mixture: str


@dataclass(frozen=True)
class Reloaded:
    """What a new process made of a saved mixture."""

    max_difference: float
    texts: list[Written]


@torch.no_grad()
def probe_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a batch, on the CPU.

    Args:
        model: in evaluation mode.
        batch: any.
    """
    outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    logits: Tensor = outputs.logits.cpu()
    return logits


def reload_in_new_process(
    adapter: Path,
    *,
    base: str,
    device: torch.device,
    batch: Batch,
    logits: Tensor,
    prompts: Sequence[Encoded],
) -> Reloaded:
    """Load a saved adapter in a new Python process, compare its logits and let it write.

    Args:
        adapter: folder of the saved mixture.
        base: location of the base model.
        device: for the new process.
        batch: what ``logits`` belong to.
        logits: of the mixture before it was saved.
        prompts: to be continued, by greedy search with the key-value cache.

    Raises:
        DemoError: if the new process fails; the message ends with its last line.
    """
    request = {
        "adapter": str(adapter.absolute()),
        "base": base,
        "device": str(device),
        # sums depend on how work is shared among threads
        "threads": torch.get_num_threads(),
        "prompts": [prompt.prompt for prompt in prompts],
    }
    with tempfile.TemporaryDirectory(prefix="moelora-reload-") as name:
        folder = Path(name)
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        tensors = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "logits": logits,
        }
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / PROBE)
        child = subprocess.run(  # noqa: S603 - our own interpreter and module, no shell
            [sys.executable, "-m", "moelora.demo.reload", name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if child.returncode != 0:
            why = (child.stderr.strip() or f"exit code {child.returncode}").splitlines()[-1]
            raise DemoError(f"The saved mixture could not be loaded in a new process: {why}")
        answer = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    return Reloaded(answer["max_difference"], [Written(**text) for text in answer["texts"]])


def answer_request(folder: Path) -> None:
    """Load what the request names, and put the answer beside it.

    Args:
        folder: as `reload_in_new_process` filled it.
    """
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    base = load_base(request["base"], device=device)
    model = PeftModel.from_pretrained(base.model, request["adapter"]).eval()
    probe = load_file(folder / PROBE)
    ids, mask = (probe[key].to(device) for key in ("input_ids", "attention_mask"))
    logits = probe_logits(model, Batch(ids, mask, labels=ids))
    difference = (logits - probe["logits"]).abs().max().item()
    texts = [_write(model, base, prompt) for prompt in request["prompts"]]
    answer = Reloaded(difference, texts)
    (folder / ANSWER).write_text(json.dumps(asdict(answer)), encoding="utf-8")


def _write(model: PeftModel, base: Base, prompt: list[int]) -> Written:
    with model.disable_adapter():
        before = _continue(model, base, prompt)
    return Written(before, _continue(model, base, prompt))


def _continue(model: PeftModel, base: Base, prompt: list[int]) -> str:
    tokenizer = base.tokenizer
    ids = torch.tensor([prompt], device=base.model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    answer_request(Path(sys.argv[1]))
