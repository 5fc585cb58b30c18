"""DyLoRA-MoE on plain PEFT: what is left of it when moelora does the routing.

Every expert is a LoRA adapter that brings its own router rows, so a new skill touches no tensor of
an older one. All active experts are routed together, token by token, in the one forward pass of the
model; an expert alone is a plain LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moelora import (
    ExpertManager,
    MoELoraConfig,
    NoveltyDetector,
    Routing,
    SkillLibrary,
    record_routing,
    skill_embeddings,
)


class DyLoRAMoE(nn.Module):
    """A causal language model whose experts come, mature and stay.

    Args:
        foundation_model: a transformers model; it is frozen.
        num_experts: experts to begin with. Made together, they start mature.
        lora_r: rank of an expert.
        lora_alpha: its alpha.
        lora_dropout: its dropout.
        target_modules: the layers that experts adapt; None for PEFT's choice.
        top_k: experts per token once all are mature; while one is young all share every token.
        temperature: divides the router logits.
        balance_coefficient: weight of the load balancing loss in the training loss.
        router_scope: ``"module"``: each adapted layer routes by its own input, in one pass;
            ``"model"``: one router reads the final hidden states of a first pass without adapters,
            as DyLoRA-MoE does (two passes).
        similarity_threshold: data whose cosine to every known skill is below is a new skill.

    Attributes:
        last_routing_weights: ``(batch, seq, experts)`` of the last forward, mean over its routers;
            None if nothing was routed.
        last_lm_loss: its language modelling loss alone; None without labels.
        last_balance_loss: its load balancing loss before the coefficient; None outside of training.
    """

    def __init__(
        self,
        foundation_model: PreTrainedModel,
        *,
        num_experts: int = 1,
        lora_r: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | str | None = None,
        top_k: int = 2,
        temperature: float = 2.0,
        balance_coefficient: float = 0.01,
        router_scope: Literal["module", "layer", "model"] = "module",
        similarity_threshold: float = 0.95,
    ) -> None:
        super().__init__()
        self.config = foundation_model.config
        self.balance_coefficient = balance_coefficient
        self.expert_manager = ExpertManager(
            foundation_model,
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            task_type="CAUSAL_LM",
            routing=MoELoraConfig(
                num_experts=1,
                joins_mixture=True,
                top_k_experts=top_k,
                router_temperature=temperature,
                router_aux_loss_coef=balance_coefficient,
                router_scope=router_scope,
                expert_capacity_factor=None,
            ),
        )
        for _ in range(num_experts):
            self.expert_manager.create_expert()
        self.expert_manager.mark_mature()
        self.foundation_model = self.expert_manager.model
        self.novelty_detector = NoveltyDetector(similarity_threshold=similarity_threshold)
        self._forget()

    @property
    def skill_library(self) -> SkillLibrary:
        """The known skills."""
        return self.novelty_detector.skill_library

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        device: torch.device = self.foundation_model.device
        return device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        expert_id: int | str | None = None,
    ) -> Any:
        """One pass over all experts, or over one.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: 0 at padding.
            labels: for the loss; -100 is left out.
            expert_id: this expert alone, with weight 1: only it gets gradients. None for all.

        Returns:
            The foundation model's output; ``loss`` holds the balancing loss in training.
        """
        self._choose(expert_id)
        self._forget()
        with record_routing(self.foundation_model) as record:
            outputs = self.foundation_model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
            )
        self._remember(outputs, list(record.routing.values()), input_ids.shape)
        return outputs

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        expert_id: int | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate in evaluation mode; every new token is routed, with the KV cache.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: 0 at padding.
            expert_id: this expert alone; None for all.
            **kwargs: of the foundation model's ``generate``.
        """
        self._choose(expert_id)
        was_training = self.training
        self.eval()
        try:
            return self.foundation_model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": True, **kwargs}
            )
        finally:
            self.train(was_training)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute blocks in backward. Keep the experts of a forward active until its backward."""
        self.foundation_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )
        self.foundation_model.enable_input_require_grads()

    # Skills ----------------------------------------------------------------------------------

    def is_novel(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> bool:
        """Whether texts belong to no known skill."""
        embeddings = skill_embeddings(self.foundation_model, input_ids, attention_mask)
        return self.novelty_detector.is_novel(embeddings)

    def add_new_skill(
        self,
        name: str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        force: bool = False,
        r: int | None = None,
    ) -> int | None:
        """Make an expert for texts of a new skill; what was learnt before is frozen.

        The new expert is young: until :meth:`mature` is called all experts share every token.

        Args:
            name: of the skill and of its expert.
            input_ids: ``(texts, seq)``, a dozen or more.
            attention_mask: 0 at padding.
            force: make an expert even if a known skill is near.
            r: its rank.

        Returns:
            The new expert's id; None if the texts belong to a known skill.
        """
        embeddings = skill_embeddings(self.foundation_model, input_ids, attention_mask)
        if not force and not self.novelty_detector.is_novel(embeddings):
            return None
        expert_id = self.expert_manager.create_expert(name, skill=name, r=r)
        self.expert_manager.freeze(range(expert_id))
        self.skill_library.add_skill(name, embeddings, metadata={"expert": name})
        self.foundation_model = self.expert_manager.model
        return expert_id

    def mature(self, expert: int | str) -> None:
        """End an expert's training: it is chosen sparsely from now on and never changes again."""
        self.expert_manager.mark_mature(expert)
        self.expert_manager.freeze(expert)

    # Files -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the experts, each an adapter folder with its router rows, and the skills."""
        self.expert_manager.save(folder)
        self.skill_library.save(Path(folder) / "skill_library.safetensors")

    @classmethod
    def from_pretrained(
        cls, foundation_model: PreTrainedModel, folder: str | Path, **options: Any
    ) -> DyLoRAMoE:
        """Load what :meth:`save_pretrained` wrote, over the same foundation model.

        Args:
            foundation_model: the model the experts were trained on.
            folder: where they are.
            **options: for experts to come, as in the constructor.
        """
        model = cls(foundation_model, num_experts=0, **options)
        loaded = ExpertManager.load(foundation_model, folder, is_trainable=True)
        loaded.defaults = model.expert_manager.defaults
        loaded.routing = model.expert_manager.routing
        model.expert_manager, model.foundation_model = loaded, loaded.model
        library = SkillLibrary.load(Path(folder) / "skill_library.safetensors")
        model.novelty_detector.skill_library = library
        return model

    # Inside ----------------------------------------------------------------------------------

    def _choose(self, expert_id: int | str | None) -> None:
        if expert_id is not None:
            self.expert_manager.set_active_expert(expert_id)
        else:
            self.expert_manager.activate_all_experts()

    def _forget(self) -> None:
        self.last_routing_weights: Tensor | None = None
        self.last_lm_loss: Tensor | None = None
        self.last_balance_loss: Tensor | None = None

    def _remember(self, outputs: Any, decisions: list[Routing], shape: torch.Size) -> None:
        if decisions:
            weights = [routing.routing_weights.to(self.device) for routing in decisions]
            self.last_routing_weights = torch.stack(weights).mean(dim=0).unflatten(0, shape)
        if outputs.loss is None:
            return
        balance = outputs.get("aux_loss")
        self.last_lm_loss = outputs.loss.detach()
        if balance is not None:
            self.last_balance_loss = balance.detach()
            self.last_lm_loss = self.last_lm_loss - self.balance_coefficient * balance.detach()
