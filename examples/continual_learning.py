"""Skills that come one after the other, and none is forgotten.

    python examples/continual_learning.py

Data arrives; is it new? A new expert, seeded alone, consolidated in company, matured; next. Runs in
seconds on a tiny random model; benchmarks/continual.py runs the same class on real text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moelora import (
    ExpertManager,
    MoELoraConfig,
    Novelty,
    NoveltyDetector,
    TwoPhaseSchedule,
    param_groups,
    record_routing,
    skill_embeddings,
)

Batch = dict[str, Tensor]
#: The share of the rates that is left in the second phase.
CONSOLIDATION = 0.25
#: So many batches tell what skill the data is.
EMBEDDED = 3


class ContinualLearner:
    """One frozen model that meets skills and keeps them.

    Args:
        base: a causal language model.
        r: rank of an expert.
        target_modules: the layers that experts adapt.
        lr: rate of an expert while it is seeded.
        router_lr: rate of its router rows.
        seeding_steps: steps in which a new expert works alone.
        consolidation_steps: steps in which it works in company and learns when to be asked.
        replay: batches of each skill that are kept, to tell the next expert's router what is not
            its own.
        similarity_threshold: data less similar to every skill is new.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        r: int = 8,
        target_modules: list[str] | str = "all-linear",
        lr: float = 2e-3,
        router_lr: float = 1e-2,
        seeding_steps: int = 20,
        consolidation_steps: int = 10,
        replay: int = 2,
        similarity_threshold: float = 0.95,
    ) -> None:
        routing = MoELoraConfig(
            num_experts=1,
            joins_mixture=True,
            top_k_experts=2,
            router_temperature=1.0,
            expert_capacity_factor=None,
            # whose text a token is of is known here, so nothing has to be balanced
            router_aux_loss_coef=0.0,
        )
        self.experts = ExpertManager(
            base, r=r, target_modules=target_modules, task_type="CAUSAL_LM", routing=routing
        )
        # its B is zero: what no skill asks for stays with the frozen model
        self.experts.create_expert("base", r=1)
        self.experts.mark_mature("base")
        self.detector = NoveltyDetector(similarity_threshold=similarity_threshold)
        self.lr, self.router_lr = lr, router_lr
        self.seeding_steps, self.consolidation_steps = seeding_steps, consolidation_steps
        self.replay = replay
        self.kept: dict[str, list[Batch]] = {}
        self.arrivals: dict[str, Novelty] = {}

    def meet(self, name: str, batches: Sequence[Batch]) -> str:
        """Data arrives: learn it, if it is new.

        Args:
            name: what to call the skill if it is.
            batches: ``input_ids``, ``attention_mask`` and ``labels`` of its texts.

        Returns:
            The skill it is: ``name``, or a known one.
        """
        # spread over all, since batches are often sorted by length
        spread = batches[:: max(1, len(batches) // EMBEDDED)]
        embeddings = self.embed(spread[:EMBEDDED])
        found = self.arrivals[name] = self.detector.assess(embeddings)
        if not found.is_novel and found.nearest is not None:
            return found.nearest
        self.experts.create_expert(name, skill=name)
        self.experts.freeze(self.experts.get_all_adapter_names()[:-1])
        self._train(name, batches)
        self.experts.mark_mature(name)
        self.experts.freeze(name)
        self.detector.skill_library.add_skill(name, embeddings)
        self.kept[name] = list(batches[: self.replay])
        return name

    def embed(self, batches: Sequence[Batch]) -> Tensor:
        """The directions of some texts in the frozen model."""
        model = self.experts.model
        rows = [skill_embeddings(model, b["input_ids"], b["attention_mask"]) for b in batches]
        return torch.cat(rows)

    def _train(self, name: str, batches: Sequence[Batch]) -> None:
        experts, model = self.experts, self.experts.model.train()
        experts.set_active_expert(name)
        # an expert alone is not routed, so its rows learn in the second phase only
        router_lr = self.router_lr / CONSOLIDATION
        optimizer = AdamW(param_groups(model, lr=self.lr, router_lr=router_lr))
        schedule = TwoPhaseSchedule(
            optimizer, seeding_steps=self.seeding_steps, consolidation_factor=CONSOLIDATION
        )
        earlier = cycle([(owner, batch) for owner in self.kept for batch in self.kept[owner]])
        steps = self.seeding_steps + self.consolidation_steps
        for step, batch in enumerate(islice(cycle(batches), steps)):
            if schedule.phase == "seeding":
                model(**batch).loss.backward()
            else:
                if step == self.seeding_steps:
                    experts.activate_all_experts()
                for owner, text in [(name, batch), *islice(earlier, 1)]:
                    self.routed_loss(owner, text).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        experts.update_record(name, add_steps=steps)
        model.eval()

    def routed_loss(self, owner: str, batch: Batch) -> Tensor:
        """The loss with all experts, and how little the routers ask for the text's own expert."""
        with record_routing(self.experts.model, keep_graph=True) as record:
            loss: Tensor = self.experts.model(**batch).loss
        real = batch["attention_mask"].flatten().bool()
        column = self.experts.columns_of(owner)[0]
        asked = [r.router_logits.log_softmax(-1)[real, column] for r in record.routing.values()]
        return loss - torch.stack(asked).mean() if asked else loss

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], *, expert: str | None = None) -> float:
        """Mean loss of all labelled tokens, with one expert chosen or with all of them routed."""
        if expert is None:
            self.experts.activate_all_experts()
        else:
            self.experts.set_active_expert(expert)
        return mean_loss(self.experts.model, batches)


def mean_loss(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Mean loss of all labelled tokens."""
    total, tokens = 0.0, 0
    for batch in batches:
        number = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * number
        tokens += number
    return total / tokens


def counting(first: int, *, batches: int = 4) -> Iterator[Batch]:
    """Texts that count round through eight tokens: a skill for each ``first``."""
    generator = torch.Generator().manual_seed(first)
    for _ in range(batches):
        ids = (torch.randint(0, 8, (8, 1), generator=generator) + torch.arange(12)) % 8 + first
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> None:
    """Five skills and one that returns, on a tiny random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    learner = ContinualLearner(
        LlamaForCausalLM(config),
        router_lr=0.1,
        consolidation_steps=30,
        similarity_threshold=0.9,
    )
    skills = {f"from {first}": list(counting(first)) for first in (2, 14, 26, 38, 50)}
    learnt = {}
    for name, batches in skills.items():
        before = learner.loss(batches, expert="base")
        learner.meet(name, batches)
        learnt[name] = learner.loss(batches, expert=name)
        print(f"{name}: new, loss {before:.3f} -> {learnt[name]:.3f}")
    print(f"from 14, again: known as {learner.meet('again', list(counting(14)))!r}")
    for name, batches in skills.items():
        chosen, routed = learner.loss(batches, expert=name), learner.loss(batches)
        same = "as it was" if chosen == learnt[name] else "changed"
        print(f"{name}: loss {chosen:.3f} with its expert ({same}), {routed:.3f} routed")


if __name__ == "__main__":
    main()
