"""A library of skills: one direction for each, and the file it is kept in."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moelora.config import is_int
from moelora.errors import CheckpointError, SkillError
from moelora.skill_embedding import unit_rows

#: The name a library is saved under where only a folder is given.
SKILL_LIBRARY_FILE = "skill_library.safetensors"
_FORMAT_KEY = "moelora_skill_library"
_FORMAT = 1
_TENSOR = "embeddings"
_SHORTEST = 1e-6


@dataclass
class _Skill:
    """What is known of one skill.

    Attributes:
        mean: the mean of its texts' unit vectors, float32 on the CPU; shorter the more they differ.
        examples: how many texts that were.
        metadata: whatever was given with it.
    """

    mean: Tensor
    examples: int
    metadata: dict[str, Any] = field(default_factory=dict)


class SkillLibrary:
    """The directions of the known skills, by name, in the order in which they came.

    Example:
        >>> library = SkillLibrary()
        >>> library.add_skill("sql", torch.tensor([[1.0, 0.0], [0.0, 1.0]]), metadata={"expert": 0})
        >>> library.similarities(torch.tensor([1.0, 0.0]))
        {'sql': 0.7071...}
    """

    def __init__(self) -> None:
        self._skills: dict[str, _Skill] = {}

    def __len__(self) -> int:
        return len(self._skills)

    def __contains__(self, name: object) -> bool:
        return name in self._skills

    @property
    def names(self) -> list[str]:
        """The names of the skills."""
        return list(self._skills)

    @property
    def embedding_size(self) -> int | None:
        """The width of the embeddings; None while there are none."""
        return next((skill.mean.shape[0] for skill in self._skills.values()), None)

    def add_skill(
        self, name: str, embeddings: Tensor, *, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Add a skill by embeddings of its texts.

        Args:
            name: not yet in the library.
            embeddings: ``(texts, hidden)``, or ``(hidden,)`` for one; normalised here.
            metadata: what else to keep, as JSON writes it: the expert's name, a date ...

        Raises:
            SkillError: if the name is no non-empty string or is taken, the embeddings are of
                another width, not finite or without direction, or the metadata is no JSON object.
        """
        if not isinstance(name, str) or not name:
            raise SkillError(f"A skill's name must be a non-empty string, got {name!r}.")
        if name in self._skills:
            raise SkillError(f"Skill {name!r} is there already. Use update_skill to add texts.")
        mean, examples = self._mean_of(embeddings)
        self._skills[name] = _Skill(mean, examples, _checked_metadata(dict(metadata or {})))

    def update_skill(self, name: str, embeddings: Tensor) -> None:
        """Let more texts of a known skill count in its embedding, each as much as every other.

        Raises:
            SkillError: if there is no such skill, or the embeddings are refused.
        """
        skill = self._skill(name)
        mean, examples = self._mean_of(embeddings)
        total = skill.examples + examples
        joined = (skill.mean.double() * skill.examples + mean.double() * examples) / total
        _check_direction(joined)
        skill.mean, skill.examples = joined.float(), total

    def remove_skill(self, name: str) -> None:
        """Forget a skill.

        Raises:
            SkillError: if there is no such skill.
        """
        self._skill(name)
        del self._skills[name]

    def embedding(self, name: str) -> Float[Tensor, " hidden"]:
        """The direction of a skill, of length 1, float32 on the CPU.

        Raises:
            SkillError: if there is no such skill.
        """
        return unit_rows(self._skill(name).mean, what=f"The embedding of skill {name!r}")

    def get_all_skills(self) -> Float[Tensor, "skills hidden"]:
        """All directions, in the order of :attr:`names`."""
        if not self._skills:
            return torch.zeros(0, 0)
        return torch.stack([self.embedding(name) for name in self._skills])

    def examples(self, name: str) -> int:
        """How many texts a skill's embedding is made of.

        Raises:
            SkillError: if there is no such skill.
        """
        return self._skill(name).examples

    def metadata(self, name: str) -> dict[str, Any]:
        """What was kept with a skill; changing the dict changes nothing here.

        Raises:
            SkillError: if there is no such skill.
        """
        return _checked_metadata(self._skill(name).metadata)

    def similarities(self, embeddings: Tensor) -> dict[str, float]:
        """The cosine between the mean direction of some texts and each skill.

        Args:
            embeddings: ``(texts, hidden)``, or ``(hidden,)`` for one.

        Raises:
            SkillError: if the embeddings are refused.
        """
        mean, _ = self._mean_of(embeddings)
        direction = unit_rows(mean.double(), what="The mean of the embeddings")
        return {
            name: float(unit_rows(skill.mean.double(), what="A skill's embedding") @ direction)
            for name, skill in self._skills.items()
        }

    def _skill(self, name: str) -> _Skill:
        try:
            return self._skills[name]
        except KeyError:
            raise SkillError(f"No skill {name!r} in the library, which has {self.names}.") from None

    def _mean_of(self, embeddings: Any) -> tuple[Tensor, int]:
        """The mean of the unit vectors, and of how many."""
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise SkillError(f"embeddings must be a float tensor, got {_kind(embeddings)}.")
        rows = embeddings.detach().unsqueeze(0) if embeddings.ndim == 1 else embeddings.detach()
        if rows.ndim != 2 or 0 in rows.shape:
            raise SkillError(
                f"embeddings must be of shape (texts, hidden) or (hidden,), got "
                f"{tuple(embeddings.shape)}."
            )
        size = self.embedding_size
        if size is not None and rows.shape[1] != size:
            raise SkillError(
                f"embeddings must have the library's width {size}, got {rows.shape[1]}."
            )
        mean = unit_rows(rows.cpu().double(), what="An embedding").mean(dim=0)
        _check_direction(mean)
        return mean.float(), rows.shape[0]

    def save(self, path: "str | os.PathLike[str]") -> Path:
        """Write the library: whole, or not at all.

        The file holds one tensor ``embeddings`` ``(skills, hidden)``, float32, and in its header a
        JSON list of the skills' names, numbers of texts and metadata.

        Args:
            path: the file to write, or a folder, where it becomes ``skill_library.safetensors``.

        Returns:
            The file's path.

        Raises:
            CheckpointError: if it cannot be written.
        """
        target = _file_in(path)
        skills = [
            {"name": name, "examples": skill.examples, "metadata": skill.metadata}
            for name, skill in self._skills.items()
        ]
        header = {_FORMAT_KEY: str(_FORMAT), "skills": json.dumps(skills)}
        means = [skill.mean for skill in self._skills.values()]
        rows = torch.stack(means) if means else torch.zeros(0, 0)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({_TENSOR: rows.contiguous()}, temporary, metadata=header)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{target} cannot be written: {error}.") from error
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "SkillLibrary":
        """Read a library that :meth:`save` wrote.

        Args:
            path: the file, or the folder it is in.

        Raises:
            CheckpointError: if it is missing, damaged, of a newer format or no skill library.
        """
        source = _file_in(path)
        try:
            with safe_open(source, framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{source} cannot be read as safetensors: {error}.") from error
        _check_format(source, header.get(_FORMAT_KEY))
        skills = _read_skills(source, header.get("skills"))
        rows = found.get(_TENSOR)
        if found.keys() != {_TENSOR} or rows is None or not _fits(rows, len(skills)):
            shapes = {key: (tuple(t.shape), str(t.dtype)) for key, t in found.items()}
            raise CheckpointError(
                f"{source} must hold one float32 tensor {_TENSOR!r} of a row for each of its "
                f"{len(skills)} skills, got {shapes}."
            )
        library = cls()
        for (name, examples, metadata), row in zip(skills, rows, strict=True):
            length = float(row.norm())
            if not _SHORTEST <= length <= 1 + _SHORTEST * 10:
                raise CheckpointError(
                    f"{source}: the embedding of skill {name!r} has length {length:.3g}, which no "
                    "mean of unit vectors has."
                )
            library._skills[name] = _Skill(row.clone(), examples, metadata)
        return library


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_direction(mean: Tensor) -> None:
    if float(mean.norm()) < _SHORTEST:
        raise SkillError("The embeddings cancel out, so their mean has no direction.")


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy by way of JSON, so that what is saved is what was given."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SkillError(f"metadata must be what JSON can write: {error}.") from error
    return copied


def _file_in(path: "str | os.PathLike[str]") -> Path:
    return Path(path) / SKILL_LIBRARY_FILE if Path(path).is_dir() else Path(path)


def _check_format(source: Path, version: str | None) -> None:
    if version is None:
        raise CheckpointError(f"{source} is no skill library of moelora: its header says nothing.")
    if not version.isdecimal() or len(version) > 9 or not 1 <= int(version) <= _FORMAT:
        raise CheckpointError(
            f"{source} has skill library format {version!r:.20}, this release reads 1 to {_FORMAT}."
        )


def _read_skills(source: Path, text: str | None) -> list[tuple[str, int, dict[str, Any]]]:
    try:
        content = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: skills in its header is no JSON list.") from error
    skills: list[tuple[str, int, dict[str, Any]]] = []
    for entry in content if isinstance(content, list) else [None]:
        known: dict[str, Any] = entry if isinstance(entry, dict) else {}
        name: Any = known.get("name")
        examples: Any = known.get("examples")
        metadata: Any = known.get("metadata")
        is_named = isinstance(name, str) and bool(name)
        is_counted = is_int(examples) and examples >= 1
        if not is_named or not is_counted or not isinstance(metadata, dict):
            raise CheckpointError(
                f"{source}: a skill in its header must have a name, a number of examples and "
                f"metadata, got {entry!r:.60}."
            )
        skills.append((name, examples, metadata))
    names = [name for name, _, _ in skills]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(f"{source}: skills {twice} are in its header twice.")
    return skills


def _fits(rows: Tensor, skills: int) -> bool:
    if rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[0] != skills:
        return False
    return bool(torch.isfinite(rows).all()) and (skills == 0 or rows.shape[1] > 0)
