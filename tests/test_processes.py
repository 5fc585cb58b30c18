"""Threads, worker processes and new processes: routing neither mixes nor gets lost."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moelora import Router, RoutingWeightsError, record_routing
from tests.lm import (
    explicit_weights,
    gradients_of,
    lora_layers,
    mixture,
    mixture_config,
    run_python,
    tiny_llama,
    token_ids,
    two_loras,
)
from tests.test_attached import AUTOMATIC
from tests.tolerances import assert_close, assert_equal

ROUNDS = 6


def attached() -> PeftModel:
    """Two adapters routed by a router of ours."""
    torch.manual_seed(4)
    model = two_loras()
    model.attach_router(Router(16, 2, top_k=1).double(), AUTOMATIC)
    return model


MODELS: dict[str, Callable[[], PeftModel]] = {
    "by layer": mixture,
    "by block": lambda: mixture(router_scope="layer"),
    "by model": lambda: mixture(router_scope="model"),
    "attached": attached,
}
KINDS = pytest.mark.parametrize("kind", MODELS)


def at_once(*works: Callable[[], Any]) -> list[list[Any]]:
    """Run each function several times in a thread of its own, all starting together."""
    barrier = threading.Barrier(len(works))

    def repeat(work: Callable[[], Any]) -> list[Any]:
        barrier.wait()
        return [work() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(repeat, work) for work in works]]


# Threads ---------------------------------------------------------------------------------------


@KINDS
def test_two_models_in_two_threads_route_each_by_itself(kind: str) -> None:
    models = [MODELS[kind]().eval(), mixture(num_experts=2, top_k_experts=1).eval()]
    expected = [model(token_ids()).logits for model in models]
    found = at_once(*[lambda m=m: m(token_ids()).logits for m in models])
    for logits, wanted in zip(found, expected, strict=True):
        assert_equal(logits, [wanted] * ROUNDS)


@pytest.mark.parametrize("kind", ["by layer", "by block", "by model"])
def test_one_model_in_two_threads_keeps_each_threads_weights(kind: str) -> None:
    model = MODELS[kind]().eval()
    weights = [explicit_weights(experts=3, seed=seed) for seed in (1, 2)]
    works = [lambda w=w: model(token_ids(), routing_weights=w).logits for w in weights]
    expected = [work() for work in works]
    found = at_once(*works)
    for logits, wanted in zip(found, expected, strict=True):
        assert_equal(logits, [wanted] * ROUNDS)


@KINDS
def test_one_model_in_two_threads_with_and_without_weights(kind: str) -> None:
    model = MODELS[kind]().eval()
    weights = explicit_weights(experts=2 if kind == "attached" else 3)
    works = [
        lambda: model(token_ids(), routing_weights=weights).logits,
        lambda: model(token_ids(2, 5, seed=8)).logits,
    ]
    expected = [work() for work in works]
    found = at_once(*works)
    for logits, wanted in zip(found, expected, strict=True):
        assert_equal(logits, [wanted] * ROUNDS)


@KINDS
def test_one_model_generates_in_two_threads(kind: str) -> None:
    model = MODELS[kind]().eval()

    def generate(seed: int) -> Tensor:
        ids = token_ids(2, 5, seed=seed)
        mask = torch.ones_like(ids)
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        found: Tensor = model.generate(input_ids=ids, **options)
        return found

    works = [lambda: generate(5), lambda: generate(6)]
    expected = [work() for work in works]
    found = at_once(*works)
    for tokens, wanted in zip(found, expected, strict=True):
        assert_equal(tokens, [wanted] * ROUNDS)


def test_an_error_in_one_thread_leaves_the_other_alone() -> None:
    model = mixture().eval()
    expected = model(token_ids()).logits

    def wrong() -> None:
        with pytest.raises(RoutingWeightsError):
            model(token_ids(), routing_weights=torch.ones(5))

    _, found = at_once(wrong, lambda: model(token_ids()).logits)
    assert_equal(found, [expected] * ROUNDS)


@KINDS
def test_one_model_trains_while_another_answers(kind: str) -> None:
    training, answering = MODELS[kind]().train(), MODELS[kind]().eval()
    expected = answering(token_ids()).logits

    def train() -> list[Tensor | None]:
        training.zero_grad()
        training(input_ids=token_ids(), labels=token_ids()).loss.backward()
        return [None if g is None else g.clone() for g in gradients_of(training)]

    wanted = train()
    gradients, logits = at_once(train, lambda: answering(token_ids()).logits)
    assert_equal(logits, [expected] * ROUNDS)
    assert_close(gradients, [wanted] * ROUNDS)


def test_a_new_thread_starts_without_the_frame_of_a_running_forward() -> None:
    model = mixture().eval()
    expected = model(token_ids()).logits
    inside: list[Tensor] = []

    def elsewhere(*_: object) -> None:
        hook.remove()
        thread = threading.Thread(target=lambda: inside.append(model(token_ids()).logits))
        thread.start()
        thread.join()

    hook = model.get_base_model().model.norm.register_forward_pre_hook(elsewhere)
    model(token_ids(), routing_weights=torch.ones(3, dtype=torch.float64))
    assert_equal(inside, [expected])


def test_a_thread_that_ends_in_a_forward_leaves_no_frame() -> None:
    model = mixture().eval()
    scope = next(iter(lora_layers(model).values())).__dict__["_moelora_binding"].scope
    at_once(lambda: model(token_ids()), lambda: model(token_ids()))
    assert scope.top is None


# Worker processes ------------------------------------------------------------------------------


class Routed(Dataset[tuple[Tensor, Tensor]]):
    """Items are computed by a model inside the worker process."""

    def __init__(self, model: PeftModel, weights: list[Tensor]) -> None:
        self.model = model
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    @torch.no_grad()
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids = token_ids(seed=index)
        explicit = self.model(ids, routing_weights=self.weights[index]).logits
        return explicit, self.model(ids).logits


@KINDS
def test_workers_of_a_data_loader_route_as_the_main_process(kind: str) -> None:
    model = MODELS[kind]().eval()
    experts = 2 if kind == "attached" else 3
    data = Routed(model, [explicit_weights(experts=experts, seed=seed) for seed in range(4)])
    expected = [data[index] for index in range(4)]
    context = multiprocessing.get_context("fork")
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context)
    for found, wanted in zip(loader, expected, strict=True):
        assert_equal(list(found), list(wanted))


def test_workers_may_start_while_the_model_records() -> None:
    model = mixture().eval()
    data = Routed(model, [explicit_weights(experts=3)])
    context = multiprocessing.get_context("fork")
    with record_routing(model) as record:
        loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
        assert len(list(loader)) == 1
    assert not record.routing


_SPAWN = """
import multiprocessing, sys, torch
from pathlib import Path

def work(models, folder):
    # the child has imported nothing but what unpickling the models brings along
    ids = torch.load(folder / "ids.pt")
    for name, model in models.items():
        weights = torch.load(folder / f"{name}.weights.pt")
        with torch.no_grad():
            found = [model(ids).logits, model(ids, routing_weights=weights).logits]
        torch.save(found, folder / f"{name}.found.pt")

if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    models = {name: torch.load(folder / f"{name}.model.pt", weights_only=False) for name in names}
    job = multiprocessing.get_context("spawn").Process(target=work, args=(models, folder))
    job.start()
    job.join()
    raise SystemExit(job.exitcode)
"""


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What each kind of model computes in a spawned process, after ``torch.save`` of it whole."""
    folder = tmp_path_factory.mktemp("spawned")
    torch.save(token_ids(), folder / "ids.pt")
    names = {kind: kind.replace(" ", "_") for kind in MODELS}
    for kind, name in names.items():
        torch.save(MODELS[kind]().eval(), folder / f"{name}.model.pt")
        experts = 2 if kind == "attached" else 3
        torch.save(explicit_weights(experts=experts), folder / f"{name}.weights.pt")
    script = folder / "main.py"
    script.write_text(_SPAWN)
    start = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    done = run_python(start, script, folder, *names.values())
    assert done.returncode == 0, done.stderr
    return lambda kind: torch.load(folder / f"{names[kind]}.found.pt")


@pytest.mark.slow
@KINDS
def test_a_spawned_process_routes_as_the_main_process(kind: str, spawned: Any) -> None:
    model = MODELS[kind]().eval()
    weights = explicit_weights(experts=2 if kind == "attached" else 3)
    by_itself, by_weights = spawned(kind)
    assert_equal(by_itself, model(token_ids()).logits.detach())
    assert_equal(by_weights, model(token_ids(), routing_weights=weights).logits.detach())


# Scopes saved and loaded in a new process -------------------------------------------------------

_RELOAD = """
import sys, torch, moelora
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
ids = torch.load(folder / "ids.pt")
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
found = {}
for scope in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / scope)
    greedy = model.generate(input_ids=ids, **options)
    beams = model.generate(input_ids=ids, num_beams=3, **options)
    found[scope] = [model(ids).logits.detach(), greedy, beams]
torch.save(found, folder / "found.pt")
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Logits, greedy tokens and beams by scope: in a new process, and here."""
    folder = tmp_path_factory.mktemp("scopes")
    tiny_llama(dtype=torch.float32).save_pretrained(folder / "base")
    ids = token_ids()
    torch.save(ids, folder / "ids.pt")
    expected = {}
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    for scope in ("module", "layer", "model"):
        model = mixture(tiny_llama(dtype=torch.float32), router_scope=scope).eval()
        model.save_pretrained(folder / scope)
        greedy = model.generate(input_ids=ids, **options)
        beams = model.generate(input_ids=ids, num_beams=3, **options)
        expected[scope] = [model(ids).logits.detach(), greedy, beams]
    done = run_python(_RELOAD, folder, "module", "layer", "model")
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    return {scope: (found[scope], expected[scope]) for scope in expected}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["module", "layer", "model"])
def test_each_scope_answers_alike_in_a_new_process(scope: str, reloaded: Any) -> None:
    found, expected = reloaded[scope]
    assert_equal(found, expected)


# Whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_whole_model_with_its_router_can_be_pickled(protocol: int) -> None:
    model = attached().eval()
    copied = pickle.loads(pickle.dumps(model, protocol=protocol))
    assert_equal(copied(token_ids()).logits, model(token_ids()).logits)
    assert copied.moe_config == model.moe_config


def test_a_whole_model_saved_by_torch_keeps_kept_tensors(tmp_path: Path) -> None:
    source, model = attached(), two_loras()
    with pytest.warns(UserWarning, match="kept for attach_router"):
        model.load_state_dict(source.state_dict())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    router = Router(16, 2).double()
    loaded.attach_router(router)
    assert_equal(router.weight, source.router.weight)


def test_an_attached_model_trains_in_a_thread_as_in_the_main_one() -> None:
    model = attached().train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    expected = [None if g is None else g.clone() for g in gradients_of(model)]
    model.zero_grad()
    thread = threading.Thread(
        target=lambda: model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    )
    thread.start()
    thread.join()
    assert_equal(gradients_of(model), expected)


def test_a_mixture_config_crosses_processes() -> None:
    config = mixture_config(router_scope="model")
    assert pickle.loads(pickle.dumps(config)) == config
