"""Train a mixture on several processes, compare it with one, save, reload, resume; print a report.

    python examples/distributed/check_gpus.py                  # two GPUs, NCCL
    python examples/distributed/check_gpus.py --device cpu     # two processes, gloo

Needs torch, transformers, peft and moelora; what else is missing is said ("skip"). Builds its own
model, so it needs no network. Exit code 1 if a check fails. A number beside a check is the largest
difference from one process (or one GPU), relative to the largest value.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks import ddp, devices, experts, fsdp
from checks.setup import CPU_TOLERANCE, GPU_TOLERANCE, Job

CHECKS: tuple[Callable[[Job], None], ...] = (
    devices.check_split_model,
    ddp.check_ddp_gradients,
    ddp.check_balance_over_ranks,
    ddp.check_sparse,
    ddp.check_checkpointing,
    ddp.check_ddp_training,
    fsdp.check_fsdp_gradients,
    fsdp.check_fsdp_checkpointing,
    fsdp.check_fsdp_training,
    fsdp.check_fsdp_bfloat16,
    experts.check_given_weights,
    experts.check_attached_router,
    devices.check_other_device,
)
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "triton", "moelora")


@contextmanager
def process_group(job: Job) -> Iterator[None]:
    """Join the others by a file, so that no port is needed."""
    cuda = job.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(job.device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{job.folder / 'rendezvous'}",
        rank=job.rank,
        world_size=job.ranks,
        # a rank whose check failed no longer answers: the others must not wait for minutes
        timeout=timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def out_of_time(job: Job, end: float) -> bool:
    """Whether any rank's time is up: all must leave out the same checks."""
    late = torch.tensor(float(time.time() > end), device=job.device)
    dist.all_reduce(late)
    return bool(late)


def work(rank: int, ranks: int, device: str, folder: str, only: str, end: float) -> None:
    """One process: run all checks, leaving what was found so far in a file after each."""
    cuda = device == "cuda"
    job = Job(
        rank,
        ranks,
        torch.device("cuda", rank) if cuda else torch.device("cpu"),
        Path(folder),
        GPU_TOLERANCE if cuda else CPU_TOLERANCE,
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks if cuda else 1))
    torch.set_float32_matmul_precision("highest")
    with process_group(job):
        for check in CHECKS:
            if only not in check.__name__:
                continue
            if out_of_time(job, end):
                job.skip(check.__name__, "out of time: --minutes")
                continue
            start = time.perf_counter()
            try:
                check(job)
            except Exception:  # noqa: BLE001 - told in the report, whatever it is
                # the others most likely fail alike: what comes next can be checked all the same
                job.report(check.__name__, traceback.format_exc().strip(), passed=False)
            finally:
                job.results[-1]["seconds"] = round(time.perf_counter() - start, 2)
                beside = job.folder / f"results-{rank}.part"
                beside.write_text(json.dumps(job.results), encoding="utf-8")
                beside.replace(job.folder / f"results-{rank}.json")


def versions() -> dict[str, str]:
    """Installed versions; "absent" for what is not there."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def version(name: str) -> str:
    """A library's version; moelora may lie on PYTHONPATH alone, uninstalled."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", "absent")


def run(arguments: argparse.Namespace, folder: str) -> list[list[dict[str, object]]]:
    """Start the processes, keep the report up to date, and return what was found."""
    start = time.time()
    job = (
        arguments.ranks,
        arguments.device,
        folder,
        arguments.only,
        start + 60 * arguments.minutes,
    )
    context = mp.start_processes(
        work, args=job, nprocs=arguments.ranks, start_method="spawn", join=False
    )
    try:
        while not context.join(timeout=1):
            write_report(arguments, found_so_far(folder, arguments.ranks))
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        print(f"FAIL  a process ended early: {error}", flush=True)
    return found_so_far(folder, arguments.ranks)


def found_so_far(folder: str, ranks: int) -> list[list[dict[str, object]]]:
    """What each rank has left in its file."""
    files = [Path(folder) / f"results-{rank}.json" for rank in range(ranks)]
    return [json.loads(f.read_text(encoding="utf-8")) if f.exists() else [] for f in files]


def write_report(arguments: argparse.Namespace, ranks: list[list[dict[str, object]]]) -> None:
    """The report, if one is wanted, whole or not at all."""
    if arguments.report is None:
        return
    summary = {"machine": machine(arguments), "versions": versions(), "ranks": ranks}
    beside = arguments.report.with_name(arguments.report.name + ".part")
    beside.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    beside.replace(arguments.report)


def machine(arguments: argparse.Namespace) -> str:
    """What the processes run on."""
    return torch.cuda.get_device_name(0) if arguments.device == "cuda" else "CPU"


def main() -> int:
    """Run the checks and say whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--minutes", type=float, default=3, help="start no check after this time")
    parser.add_argument("--report", type=Path, help="also keep the results here, as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        print(f"{arguments.ranks} GPUs are needed, {torch.cuda.device_count()} found.")
        return 2
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{arguments.ranks} x {machine(arguments)}; {libraries}", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        ranks = run(arguments, folder)
    write_report(arguments, ranks)
    failed = [entry for results in ranks for entry in results if entry["result"] == "FAIL"]
    for rank, results in enumerate(ranks):
        for entry in results:
            if entry["result"] == "FAIL":
                print(f"FAILED on rank {rank}: {entry['check']}: {entry['note']}")
    counts = {kind: sum(e["result"] == kind for e in ranks[0]) for kind in ("ok", "FAIL", "skip")}
    complete = len({len(results) for results in ranks}) == 1 and counts["ok"] > 0
    print(
        f"{counts['ok']} checks passed, {counts['FAIL']} failed, {counts['skip']} skipped"
        f" in {time.time() - start:.0f} s{'' if complete else '; not all ranks came to the end'}"
    )
    return 1 if failed or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
