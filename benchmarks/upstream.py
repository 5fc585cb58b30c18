"""``python -m benchmarks.upstream``: what the diffs of ``docs/upstream.md`` cost plain LoRA.

The diffs are applied to a copy of the installed PEFT. Processes with the stock and the patched
copy take turns; each first tells a digest of its outputs, which has to be the same, then times
calls in the CPU time of its thread, in which other work on the machine does not count. What the one
branch more in a layer costs is too little to see so, and is timed in one process.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "upstream.md"
OUT = ROOT / "benchmarks" / "results" / "upstream" / "peft-proposal-cpu.json"
ARGUMENT = "routing_weights"
SUBJECTS = {
    "layer, one process": "one layer, 64 x 64, one token; in one process",
    "layer": "the same, in two processes",
    "model": "a model of 84 adapted layers, 16 tokens",
    "model, argument given": "the same model, a registered argument given",
}
Call = Callable[[], Any]


def diffs() -> list[str]:
    """The diffs of the page, in their order."""
    return re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def copies(folder: Path) -> dict[str, Path]:
    """Folders to put on the path: PEFT as installed, and with the page's diffs applied."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("PEFT is not installed.")
    places = {name: folder / name for name in ("stock", "patched")}
    for place in places.values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(spec.origin).parent, place / "peft", ignore=ignore)
    # inside a repository git would take the paths for that one's
    alone = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    alone["GIT_CEILING_DIRECTORIES"] = str(folder.resolve())
    apply = ["git", "apply", "--whitespace=nowarn", "-"]
    for diff in diffs():
        subprocess.run(  # noqa: S603 - fixed words
            apply, cwd=places["patched"].resolve(), env=alone, input=diff, text=True, check=True
        )
    return places


def small_layer() -> Any:
    """So small that Python's time is all of it."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from torch import nn

    config = LoraConfig(r=8, init_lora_weights=False)
    return Linear(nn.Linear(64, 64), "default", config=config, r=8, lora_alpha=8)


def subjects() -> dict[str, Call]:
    """What is timed: one small layer, and a model of 84 adapted layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import layer as lora
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    linear = small_layer()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads))
    config = LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(base, config).eval()
    x, ids = torch.randn(1, 64), torch.arange(16)[None]
    calls: dict[str, Call] = {
        "layer": lambda: linear(x),
        "model": lambda: model(input_ids=ids, use_cache=False).logits,
    }
    if hasattr(lora, "register_forward_kwarg"):
        lora.register_forward_kwarg(ARGUMENT)
        weights = {ARGUMENT: torch.ones(1)}
        calls["model, argument given"] = lambda: (
            model(input_ids=ids, use_cache=False, **weights).logits
        )
    return calls


def measure(seconds: float) -> dict[str, Any]:
    """Digests of all outputs and microseconds of one call, in this process."""
    import torch

    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, call in subjects().items():
            digest = hashlib.sha256(call().numpy().tobytes()).hexdigest()
            repeats = max(1, int(seconds / 40 / _cpu_seconds(call, 3)))
            # what disturbs a process only adds
            fastest = min(_cpu_seconds(call, repeats) for _ in range(40))
            found[name] = {"digest": digest, "us": fastest * 1e6}
    return found


def branch(stock: Path, seconds: float) -> dict[str, Any]:
    """One layer's forward of stock PEFT and the patched one, in turns in this one process.

    The stock function is compiled from its file, with the names of the patched module. Between
    processes the difference drowns in what else differs between them.
    """
    import torch
    from peft.tuners.lora import layer as lora

    tree = ast.parse((stock / "peft/tuners/lora/layer.py").read_text(encoding="utf-8"))
    (linear,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Linear"]
    forward = [n for n in linear.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
    names = dict(vars(lora))
    flags = annotations.compiler_flag
    code = compile(ast.Module(forward, []), "stock", "exec", flags=flags)
    exec(code, names)  # noqa: S102 - a function of the installed PEFT
    layer, x = small_layer(), torch.randn(1, 64)
    calls = {"stock": names["forward"], "patched": lora.Linear.forward}
    found: dict[str, list[dict[str, Any]]] = {"stock": [], "patched": [], "added": []}
    with torch.no_grad():
        repeats = max(1, int(seconds / 800 / _cpu_seconds(lambda: layer(x), 50)))
        for _ in range(20):
            # medians of many short turns: a disturbance hits few of them
            turns: dict[str, list[float]] = {"stock": [], "patched": []}
            for number in range(20):
                for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
                    call = partial(calls[name], layer, x)
                    turns[name].append(_cpu_seconds(call, repeats) * 1e6)
            for name, times in turns.items():
                found[name].append({"us": statistics.median(times)})
            pairs = zip(turns["stock"], turns["patched"], strict=True)
            added = statistics.median(patched - stock for stock, patched in pairs)
            found["added"].append({"us": added})
    return {f"{name}_us": _quantiles(runs) for name, runs in found.items()}


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def compare(*, rounds: int, seconds: float) -> dict[str, Any]:
    """Let stock and patched PEFT take turns.

    Raises:
        RuntimeError: if an output changes by one bit.
    """
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "patched": []}
    with tempfile.TemporaryDirectory() as folder:
        places = copies(Path(folder))
        for number in range(rounds):
            order = list(places) if number % 2 == 0 else list(places)[::-1]
            for name in order:
                runs[name].append(_in_process(places[name], seconds))
        code = f"print(json.dumps(branch(Path({str(places['stock'])!r}), {seconds})))"
        alone = _in_process(places["patched"], seconds, code)
    results: dict[str, Any] = {"layer, one process": alone}
    for name in runs["patched"][0]:
        stock = [run[name] for run in runs["stock"] if name in run]
        patched = [run[name] for run in runs["patched"]]
        digests = {run["digest"] for run in [*stock, *patched]}
        if len(digests) != 1:
            raise RuntimeError(f"{name}: the patched PEFT gives another output.")
        results[name] = {"patched_us": _quantiles(patched)}
        if stock:
            results[name]["stock_us"] = _quantiles(stock)
            pairs = zip(stock, patched, strict=True)
            added = [{"us": one["us"] - other["us"]} for other, one in pairs]
            results[name]["added_us"] = _quantiles(added)
    return results


def table(content: dict[str, Any]) -> str:
    """The page's table of a run."""
    lines = [
        "| one forward of | stock PEFT | patched | added, call by call |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, result in content["results"].items():
        cells = [_shown(result.get(kind)) for kind in ("stock_us", "patched_us", "added_us")]
        lines.append(f"| {SUBJECTS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(quantiles: dict[str, float] | None) -> str:
    if quantiles is None:
        return ""
    unit, scale = ("ms", 1e-3) if abs(quantiles["p50"]) >= 1000 else ("us", 1)
    p20, p50, p80 = (f"{quantiles[name] * scale:.3g}" for name in ("p20", "p50", "p80"))
    return f"{p50} {unit} ({p20} to {p80})"


def with_table(text: str, content: dict[str, Any]) -> str:
    """The page with the table of a run between its marks."""
    made = f"\\1\n{table(content)}\n\n\\2"
    return re.sub(r"(<!-- cost:begin -->\n).*?(<!-- cost:end -->)", made, text, flags=re.S)


def _quantiles(runs: list[dict[str, Any]]) -> dict[str, float]:
    values = [run["us"] for run in runs]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    named = {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}
    return {name: round(value, 3) for name, value in named.items()}


def _in_process(place: Path, seconds: float, code: str = "") -> dict[str, Any]:
    path = os.pathsep.join([str(place), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = code or f"print(json.dumps(measure({seconds})))"
    code = f"import json\nfrom benchmarks.upstream import *\n{code}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(  # noqa: S603 - this file
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> int:
    """Compare, write the file, and put its table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="processes of each kind")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    import torch

    from benchmarks.environment import environment

    results = compare(rounds=arguments.rounds, seconds=arguments.seconds)
    content = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.upstream --rounds {arguments.rounds}"
        f" --seconds {arguments.seconds:g}",
        "environment": {**environment(torch.device("cpu")), "threads": 1},
        "diffs_sha256": hashlib.sha256("".join(diffs()).encode()).hexdigest(),
        "quantity": "CPU time of one forward in microseconds; the first result in one process, "
        "the others of the fastest of 40 parts of each process, over processes in turns",
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
