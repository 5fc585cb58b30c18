"""A library of skills and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from moelora import CheckpointError, SkillError, SkillLibrary
from tests.models import unchecked_types
from tests.tolerances import assert_close, assert_equal

EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def library_of(**skills: Tensor) -> SkillLibrary:
    library = SkillLibrary()
    for name, embedding in skills.items():
        library.add_skill(name, embedding)
    return library


def rows(number: int, *, seed: int = 0, size: int = 5) -> Tensor:
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed))


def assert_same_library(actual: SkillLibrary, expected: SkillLibrary) -> None:
    assert actual.names == expected.names
    assert_equal(actual.get_all_skills(), expected.get_all_skills())
    for name in expected.names:
        assert actual.examples(name) == expected.examples(name)
        assert actual.metadata(name) == expected.metadata(name)


def test_a_skill_is_the_mean_direction_of_its_texts() -> None:
    texts = rows(4)
    library = library_of(sql=texts)
    unit = texts.double() / texts.double().norm(dim=1, keepdim=True)
    mean = unit.mean(dim=0)
    assert_close(library.embedding("sql"), (mean / mean.norm()).float())
    assert library.examples("sql") == 4


def test_one_text_may_come_without_an_axis_of_texts() -> None:
    assert_equal(library_of(a=EAST).embedding("a"), library_of(a=EAST[None]).embedding("a"))


def test_skills_keep_the_order_in_which_they_came() -> None:
    library = library_of(z=EAST, a=NORTH, m=EAST + NORTH)
    assert library.names == ["z", "a", "m"]
    assert_close(library.get_all_skills()[1], NORTH)
    assert len(library) == 3
    assert "a" in library
    assert "b" not in library
    assert library.embedding_size == 2


def test_an_empty_library_has_no_rows() -> None:
    library = SkillLibrary()
    assert library.get_all_skills().shape == (0, 0)
    assert library.embedding_size is None
    assert library.similarities(EAST) == {}


def test_similarities_are_cosines() -> None:
    library = library_of(east=EAST * 7, north=NORTH)
    found = library.similarities(torch.tensor([3.0, 4.0]))
    assert found == pytest.approx({"east": 0.6, "north": 0.8})


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_texts_added_later_count_as_if_they_had_come_at_once(
    first: int, second: int, seed: int
) -> None:
    texts = rows(first + second, seed=seed)
    later = library_of(a=texts[:first])
    later.update_skill("a", texts[first:])
    at_once = library_of(a=texts)
    assert_close(later.embedding("a"), at_once.embedding("a"))
    assert later.examples("a") == at_once.examples("a")


def test_an_embedding_may_have_any_float_dtype_and_a_graph() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        library = library_of(a=EAST.to(dtype).requires_grad_())
        assert library.embedding("a").dtype == torch.float32
        assert not library.embedding("a").requires_grad


def test_changing_what_was_given_or_returned_changes_no_skill() -> None:
    given_row, metadata = EAST.clone(), {"steps": [1]}
    library = SkillLibrary()
    library.add_skill("a", given_row, metadata=metadata)
    given_row.zero_()
    metadata["steps"].append(2)
    library.embedding("a").zero_()
    library.metadata("a")["steps"].append(3)
    assert_equal(library.embedding("a"), EAST)
    assert library.metadata("a") == {"steps": [1]}


def test_a_removed_skill_is_gone() -> None:
    library = library_of(a=EAST, b=NORTH)
    library.remove_skill("a")
    assert library.names == ["b"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.add_skill("a", EAST), "Skill 'a' is there already. Use update_skill"),
        (lambda x: x.add_skill("", EAST), "name must be a non-empty string, got ''"),
        (lambda x: x.add_skill(3, EAST), "name must be a non-empty string, got 3"),
        (lambda x: x.add_skill("b", rows(1)), "must have the library's width 2, got 5"),
        (lambda x: x.add_skill("b", torch.ones(2, dtype=torch.long)), "float tensor, got torch.in"),
        (lambda x: x.add_skill("b", [1.0, 0.0]), "must be a float tensor, got list"),
        (lambda x: x.add_skill("b", torch.ones(1, 1, 2)), r"shape \(texts, hidden\).*\(1, 1, 2\)"),
        (lambda x: x.add_skill("b", torch.ones(0, 2)), r"got \(0, 2\)"),
        (lambda x: x.add_skill("b", torch.zeros(2)), "An embedding is zero, so it has no directio"),
        (lambda x: x.add_skill("b", EAST * float("inf")), "An embedding holds NaN or infinity"),
        (lambda x: x.add_skill("b", torch.stack([EAST, -EAST])), "cancel out"),
        (lambda x: x.add_skill("b", EAST, metadata={"x": {1}}), "metadata must be what JSON can"),
        (lambda x: x.add_skill("b", EAST, metadata={"x": float("nan")}), "metadata must be what"),
        (lambda x: x.update_skill("a", -EAST), "cancel out"),
        (lambda x: x.update_skill("c", EAST), r"No skill 'c' in the library, which has \['a'\]"),
        (lambda x: x.embedding("c"), "No skill 'c'"),
        (lambda x: x.remove_skill("c"), "No skill 'c'"),
        (lambda x: x.examples("c"), "No skill 'c'"),
        (lambda x: x.metadata("c"), "No skill 'c'"),
        (lambda x: x.similarities(rows(2)), "must have the library's width 2, got 5"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(call: Any, message: str) -> None:
    library = library_of(a=EAST)
    with unchecked_types(), pytest.raises(SkillError, match=message):
        call(library)
    assert_same_library(library, library_of(a=EAST))


# The file -------------------------------------------------------------------------------------


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    library = library_of(a=rows(3), b=rows(2, seed=1))
    library.add_skill("ünï", rows(1, seed=2), metadata={"expert": "e0", "steps": 3})
    path = library.save(tmp_path / "deep" / "skills.safetensors")
    assert path == tmp_path / "deep" / "skills.safetensors"
    loaded = SkillLibrary.load(path)
    assert_same_library(loaded, library)
    loaded.update_skill("a", rows(4, seed=3))
    library.update_skill("a", rows(4, seed=3))
    assert_same_library(loaded, library)


def test_an_empty_library_can_be_saved(tmp_path: Path) -> None:
    SkillLibrary().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["skill_library.safetensors"]
    assert len(SkillLibrary.load(tmp_path)) == 0


def test_a_failed_save_leaves_the_earlier_file(tmp_path: Path, monkeypatch: Any) -> None:
    library_of(a=EAST).save(tmp_path)

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("moelora.skill_library.save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        library_of(b=NORTH).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["skill_library.safetensors"]
    assert SkillLibrary.load(tmp_path).names == ["a"]


def header(**changes: Any) -> dict[str, str]:
    skills = [{"name": "a", "examples": 1, "metadata": {}}]
    return {"moelora_skill_library": "1", "skills": json.dumps(skills), **changes}


def skills_header(**changes: Any) -> dict[str, str]:
    return header(skills=json.dumps([{"name": "a", "examples": 1, "metadata": {}, **changes}]))


ROW = EAST[None].clone()
BAD_FILES: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "another file": ({"embeddings": ROW}, {}, "is no skill library of moelora"),
    "a newer format": (
        {"embeddings": ROW},
        header(moelora_skill_library="2"),
        "has skill library format '2', this release reads 1 to 1",
    ),
    "a strange format": ({"embeddings": ROW}, header(moelora_skill_library="-1"), "format '-1'"),
    "no list": ({"embeddings": ROW}, header(skills="{"), "skills in its header is no JSON list"),
    "an object": ({"embeddings": ROW}, header(skills="{}"), "must have a name, a number of exampl"),
    "deep nesting": ({"embeddings": ROW}, header(skills="[" * 10**5), "is no JSON list"),
    "no name": ({"embeddings": ROW}, skills_header(name=""), "must have a name"),
    "a number as name": ({"embeddings": ROW}, skills_header(name=3), "must have a name"),
    "no examples": ({"embeddings": ROW}, skills_header(examples=0), "must have a name, a number"),
    "half an example": (
        {"embeddings": ROW},
        skills_header(examples=0.5),
        "must have a name, a num",
    ),
    "no metadata": ({"embeddings": ROW}, skills_header(metadata=None), "must have a name, a numbe"),
    "a name twice": (
        {"embeddings": torch.stack([EAST, NORTH])},
        header(skills=json.dumps([{"name": "a", "examples": 1, "metadata": {}}] * 2)),
        r"skills \['a'\] are in its header twice",
    ),
    "no tensor": ({}, header(), "must hold one float32 tensor 'embeddings'"),
    "another tensor too": ({"embeddings": ROW, "x": EAST}, header(), "must hold one float32 tens"),
    "a row too many": ({"embeddings": torch.stack([EAST, NORTH])}, header(), "must hold one float"),
    "float64": ({"embeddings": ROW.double()}, header(), "must hold one float32 tensor"),
    "no width": ({"embeddings": torch.zeros(1, 0)}, header(), "must hold one float32 tensor"),
    "NaN": ({"embeddings": ROW * float("nan")}, header(), "must hold one float32 tensor"),
    "a zero row": ({"embeddings": ROW * 0}, header(), "skill 'a' has length 0, which no"),
    "a long row": ({"embeddings": ROW * 3}, header(), "skill 'a' has length 3, which no"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_right_is_refused(name: str, tmp_path: Path) -> None:
    tensors, metadata, message = BAD_FILES[name]
    save_file(tensors, tmp_path / "skill_library.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        SkillLibrary.load(tmp_path)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "skill_library.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SkillLibrary.load(path)
    library_of(a=EAST).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SkillLibrary.load(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "skill_library.pt"
    torch.save({"a": EAST}, path)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SkillLibrary.load(path)
