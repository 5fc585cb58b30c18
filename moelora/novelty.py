"""Is this data a skill that is known already?

An embedding is the mean of a text's final hidden states in the frozen base model, normalised to
length 1. A :class:`~moelora.SkillLibrary` keeps one such direction for every skill; a
:class:`NoveltyDetector` asks how near new data is to them, or how undecided a router is about it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moelora.config import is_number
from moelora.errors import ConfigError, SkillError
from moelora.skill_embedding import pool_hidden_states, skill_embeddings
from moelora.skill_library import SkillLibrary

__all__ = [
    "Novelty",
    "NoveltyDetector",
    "SkillLibrary",
    "pool_hidden_states",
    "router_entropy",
    "skill_embeddings",
]

Comparison = Literal["nearest", "median"]


@dataclass(frozen=True)
class Novelty:
    """What a :class:`NoveltyDetector` found.

    Attributes:
        is_novel: whether the data is a new skill.
        similarity: the cosine that was held against the threshold; None without any skill.
        nearest: the most similar skill; None without any.
        similarities: the cosine to every skill, by name.
    """

    is_novel: bool
    similarity: float | None
    nearest: str | None
    similarities: dict[str, float]


def router_entropy(
    router_probs: Float[Tensor, "*batch experts"],
    *,
    token_mask: Bool[Tensor, "*batch"] | None = None,
) -> float:
    """How undecided a router is on average: 0 for certain, 1 for uniform over its experts.

    ``mean_t -sum_e p_te ln p_te / ln E`` over the real tokens; 0 where there is one expert only.

    Args:
        router_probs: softmax of the router logits over all experts.
        token_mask: True for real tokens.

    Raises:
        SkillError: if there is no real token, or the probabilities of a token do not sum to 1.

    Example:
        >>> router_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        0.5
    """
    probs = router_probs.detach().double().reshape(-1, router_probs.shape[-1])
    if token_mask is not None:
        probs = probs[token_mask.reshape(-1).to(probs.device)]
    if not probs.shape[0]:
        raise SkillError("router_probs hold no real token.")
    sums = probs.sum(dim=-1)
    if not bool(((sums - 1).abs() < 1e-2).all()) or bool((probs < 0).any()):
        raise SkillError(
            "router_probs must be probabilities that sum to 1 for each token, got sums from "
            f"{float(sums.min()):.3g} to {float(sums.max()):.3g}."
        )
    experts = probs.shape[-1]
    if experts == 1:
        return 0.0
    entropy = torch.special.entr(probs).sum(dim=-1).mean()
    uniform = torch.log(torch.tensor(float(experts), dtype=torch.float64))
    return float(entropy / uniform)


class NoveltyDetector:
    """Says whether data belongs to a known skill or is a new one.

    By embeddings: data is new if the cosine between its mean direction and the nearest skill (or
    the median of the cosines to all skills) is below ``similarity_threshold``; with an empty
    library everything is. By a router: if its normalised entropy is above ``entropy_threshold``.

    The median suits a library of many skills that are kin; with few, of which each is far from the
    others, only the nearest tells. The default is for means over a dozen texts or more; a single
    text lies lower. With SmolLM2-135M, other texts of a skill have a cosine of 0.98 and more to it,
    and texts of another skill of 0.85 to 0.95. Skills that read alike and differ in what is to be
    answered (English to French, English to German: 0.98) are not told apart.

    Args:
        skill_library: the known skills; an empty one by default.
        similarity_threshold: in ``[-1, 1]``.
        compare: ``"nearest"`` or ``"median"``.
        entropy_threshold: in ``[0, 1]``.

    Raises:
        ConfigError: if a threshold or ``compare`` is not allowed.

    Example:
        >>> detector = NoveltyDetector()
        >>> detector.is_novel(torch.tensor([1.0, 0.0]))
        True
        >>> detector.skill_library.add_skill("first", torch.tensor([1.0, 0.0]))
        >>> detector.is_novel(torch.tensor([1.0, 0.1])), detector.is_novel(torch.tensor([0.0, 1.0]))
        (False, True)
    """

    def __init__(
        self,
        skill_library: SkillLibrary | None = None,
        *,
        similarity_threshold: float = 0.95,
        compare: Comparison = "nearest",
        entropy_threshold: float = 0.9,
    ) -> None:
        if not is_number(similarity_threshold) or not -1 <= similarity_threshold <= 1:
            raise ConfigError(
                f"similarity_threshold must be a number in [-1, 1], got {similarity_threshold!r}."
            )
        if not is_number(entropy_threshold) or not 0 <= entropy_threshold <= 1:
            raise ConfigError(
                f"entropy_threshold must be a number in [0, 1], got {entropy_threshold!r}."
            )
        allowed = get_args(Comparison)
        if compare not in allowed:
            raise ConfigError(
                f"compare must be one of {', '.join(map(repr, allowed))}, got {compare!r}."
            )
        self.skill_library = SkillLibrary() if skill_library is None else skill_library
        self.similarity_threshold = similarity_threshold
        self.compare: Comparison = compare
        self.entropy_threshold = entropy_threshold

    def assess(self, embeddings: Tensor) -> Novelty:
        """Compare the mean direction of some texts with every skill.

        Args:
            embeddings: ``(texts, hidden)``, or ``(hidden,)`` for one.

        Raises:
            SkillError: if the embeddings are refused.
        """
        similarities = self.skill_library.similarities(embeddings)
        if not similarities:
            return Novelty(is_novel=True, similarity=None, nearest=None, similarities={})
        nearest = max(similarities, key=similarities.__getitem__)
        similarity = similarities[nearest]
        if self.compare == "median":
            cosines = torch.tensor(list(similarities.values()), dtype=torch.float64)
            similarity = float(cosines.quantile(0.5))
        is_novel = similarity < self.similarity_threshold
        return Novelty(is_novel, similarity, nearest, similarities)

    def is_novel(self, embeddings: Tensor) -> bool:
        """Whether texts are a new skill, by their embeddings.

        Args:
            embeddings: ``(texts, hidden)``, or ``(hidden,)`` for one.

        Raises:
            SkillError: if the embeddings are refused.
        """
        return self.assess(embeddings).is_novel

    def is_uncertain(
        self,
        router_probs: Float[Tensor, "*batch experts"],
        *,
        token_mask: Bool[Tensor, "*batch"] | None = None,
    ) -> bool:
        """Whether texts are a new skill, by how undecided a router is about their tokens.

        A router that has never been trained is undecided about everything, and one over a single
        expert never is.

        Args:
            router_probs: softmax of the router logits, as in :class:`~moelora.Routing`.
            token_mask: True for real tokens.

        Raises:
            SkillError: as :func:`router_entropy`.
        """
        return router_entropy(router_probs, token_mask=token_mask) > self.entropy_threshold
