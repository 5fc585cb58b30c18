"""The two-phase learning-rate schedule."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainingArguments

from moelora import ConfigError, ExpertManager, TwoPhaseSchedule, update_optimizer
from tests.experts import Plain
from tests.models import unchecked_types


def optimiser(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def run(schedule: TwoPhaseSchedule, steps: int) -> list[list[float]]:
    """The rates with which so many steps are made."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return rates


@st.composite
def settings(draw: Any) -> dict[str, Any]:
    seeding = draw(st.integers(1, 6))
    return {
        "seeding_steps": seeding,
        "warmup_steps": draw(st.integers(0, seeding - 1)),
        "transition_steps": draw(st.integers(0, 4)),
        "consolidation_factor": draw(st.floats(0.01, 1.0)),
    }


@given(settings())
def test_the_rate_rises_stays_falls_and_stays(options: dict[str, Any]) -> None:
    seeding, warmup = options["seeding_steps"], options["warmup_steps"]
    low, falling = options["consolidation_factor"], options["transition_steps"]
    rates = [rate for (rate,) in run(TwoPhaseSchedule(optimiser(1.0), **options), 16)]
    expected = [(n + 1) / (warmup + 1) for n in range(warmup)]
    expected += [1.0] * (seeding - warmup)
    expected += [1 - (1 - low) * (n + 1) / (falling + 1) for n in range(falling)]
    expected += [low] * (16 - len(expected))
    assert rates == pytest.approx(expected)


@given(settings())
def test_every_group_keeps_its_share_of_the_rate(options: dict[str, Any]) -> None:
    for first, second in run(TwoPhaseSchedule(optimiser(1.0, 0.25), **options), 12):
        assert second == pytest.approx(first / 4)


@given(settings(), st.integers(0, 12))
def test_a_saved_schedule_goes_on_where_it_stopped(options: dict[str, Any], steps: int) -> None:
    whole = TwoPhaseSchedule(optimiser(0.5, 2.0), **options)
    expected = run(whole, 14)[steps:]
    first = TwoPhaseSchedule(optimiser(0.5, 2.0), **options)
    run(first, steps)
    second = TwoPhaseSchedule(optimiser(0.5, 2.0), seeding_steps=99)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert run(second, 14 - steps) == expected
    assert second.phase == whole.phase


def test_the_state_can_be_read_without_running_code(tmp_path: Path) -> None:
    schedule = TwoPhaseSchedule(optimiser(1.0), seeding_steps=2)
    run(schedule, 3)
    torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
    state = torch.load(tmp_path / "scheduler.pt", weights_only=True)
    assert state == schedule.state_dict()


def test_the_phase_is_that_of_the_next_step() -> None:
    schedule = TwoPhaseSchedule(optimiser(1.0), seeding_steps=2)
    phases = []
    for _ in range(4):
        phases.append(schedule.phase)
        run(schedule, 1)
    assert phases == ["seeding", "seeding", "consolidation", "consolidation"]


def test_the_next_expert_is_seeded_anew() -> None:
    schedule = TwoPhaseSchedule(optimiser(1.0), seeding_steps=2, warmup_steps=1)
    first = run(schedule, 5)
    schedule.restart()
    assert schedule.get_last_lr() == first[0]
    assert run(schedule, 5) == first


def test_groups_that_join_later_follow() -> None:
    schedule = TwoPhaseSchedule(optimiser(1.0), seeding_steps=2, consolidation_factor=0.5)
    run(schedule, 1)
    schedule.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 4.0})
    assert run(schedule, 3) == [[1.0, 4.0], [0.5, 2.0], [0.5, 2.0]]


def test_new_experts_in_a_group_of_their_own_follow() -> None:
    experts = ExpertManager(Plain(), target_modules=["first"])
    experts.create_expert()
    optimizer = torch.optim.AdamW([p for p in experts.model.parameters() if p.requires_grad], lr=1)
    schedule = TwoPhaseSchedule(optimizer, seeding_steps=1, consolidation_factor=0.5)
    run(schedule, 2)
    experts.create_expert()
    update_optimizer(optimizer, experts.model, lr=8.0)
    schedule.restart()
    assert run(schedule, 2) == [[1.0, 8.0], [0.5, 4.0]]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=rate)
    schedule = TwoPhaseSchedule(optimizer, seeding_steps=1, consolidation_factor=0.5)
    assert run(schedule, 3) == [[1.0], [0.5], [0.5]]
    schedule.restart()
    assert run(schedule, 2) == [[1.0], [0.5]]
    assert optimizer.param_groups[0]["lr"] is rate


def test_trainer_takes_it_and_resumes_it(tmp_path: Path) -> None:
    class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": torch.full((1,), float(index))}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * x).pow(2).mean()}

    def trainer() -> Trainer:
        model = Loss()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        schedule = TwoPhaseSchedule(optimizer, seeding_steps=3, consolidation_factor=0.5)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            max_steps=6,
            save_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=Data(), optimizers=(optimizer, schedule))

    def rates(made: Trainer) -> list[float]:
        return [log["learning_rate"] for log in made.state.log_history if "learning_rate" in log]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = trainer()
        first.train()
        second = trainer()
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # Trainer logs the rate of the step just made
    assert rates(first) == pytest.approx([1e-3] * 3 + [5e-4] * 3)
    assert rates(second) == pytest.approx([1e-3] * 3 + [5e-4] * 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seeding_steps": 0}, "seeding_steps must be an integer of at least 1, got 0"),
        ({"seeding_steps": 1.5}, "seeding_steps must be an integer of at least 1, got 1.5"),
        ({"seeding_steps": 2, "warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        (
            {"seeding_steps": 2, "warmup_steps": 2},
            "warmup_steps must be less than seeding_steps=2, got 2",
        ),
        ({"seeding_steps": 2, "transition_steps": None}, "transition_steps must be an integer"),
        (
            {"seeding_steps": 2, "consolidation_factor": 0},
            r"consolidation_factor must be a number in \(0, 1\], got 0",
        ),
        ({"seeding_steps": 2, "consolidation_factor": 1.5}, "consolidation_factor must be a numb"),
        (
            {"seeding_steps": 2, "consolidation_factor": float("nan")},
            "consolidation_factor must be a number",
        ),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], match: str) -> None:
    with unchecked_types(), pytest.raises(ConfigError, match=match):
        TwoPhaseSchedule(optimiser(1.0), **options)
