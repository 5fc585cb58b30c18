"""The demo's own skills: enough of them, always the same, disjoint, and true."""

import ast
import importlib.util
from itertools import islice
from pathlib import Path

import pytest

from moelora.demo.errors import DemoError
from moelora.demo.skills import Example, Skill
from moelora.demo.sources import PACKAGES, build, build_skills
from moelora.demo.sources.derivatives import derivative_candidates
from moelora.demo.sources.packages import package_folder
from moelora.demo.sources.split import is_near_duplicate

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason=f"needs {', '.join(PACKAGES)}",
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def skills() -> dict[str, Skill]:
    return {skill.name: skill for skill in build_skills(seed=0)}


def _answer(example: Example) -> tuple[str, str]:
    return example.prompt.split(": ", 1)[1], example.completion


def test_four_skills_have_full_splits_and_a_named_source(skills: dict[str, Skill]) -> None:
    assert list(skills) == ["chemistry", "derivative", "french", "python"]
    for skill in skills.values():
        assert (len(skill.train), len(skill.valid)) == (build.TRAIN_SIZE, build.VALID_SIZE)
        assert skill.source.rsplit(", ", 1)[1] in {"MIT", "BSD", "PSF"}


def test_the_same_seed_builds_the_same(skills: dict[str, Skill]) -> None:
    assert build_skills(seed=0) == list(skills.values())


def test_another_seed_asks_for_other_derivatives() -> None:
    drawn = [set(islice(derivative_candidates(seed=seed), 30)) for seed in ("a", "b")]
    assert len(drawn[0] & drawn[1]) < 15


def test_no_validation_example_repeats_training(skills: dict[str, Skill]) -> None:
    for skill in skills.values():
        prompts = {example.prompt for example in skill.train}
        assert prompts.isdisjoint(example.prompt for example in skill.valid)
        for example in skill.valid[:10]:
            assert not any(
                is_near_duplicate(example.completion, seen.completion) for seen in skill.train
            )


def test_every_text_is_short_and_clean(skills: dict[str, Skill]) -> None:
    for skill in skills.values():
        for example in skill.train + skill.valid:
            assert len(example.prompt) + len(example.completion) <= 260
            assert example.completion == example.completion.strip() != ""


def test_every_derivative_is_right(skills: dict[str, Skill]) -> None:
    # by difference quotients, so that sympy does not vouch for itself
    import sympy

    x = sympy.Symbol("x")
    for example in skills["derivative"].train + skills["derivative"].valid:
        question, answer = (sympy.sympify(text) for text in _answer(example))
        step, place = sympy.Float("1e-15", 60), sympy.Float("0.3", 60)
        ahead, behind = (question.subs(x, place + sign * step).evalf(60) for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        assert abs(slope - answer.subs(x, place).evalf(60)) < 1e-9 * (1 + abs(slope)), example


def test_validation_asks_for_derivatives_of_unseen_shapes(skills: dict[str, Skill]) -> None:
    def shape(example: Example) -> str:
        return "".join("n" if c.isdigit() else c for c in _answer(example)[0]).replace("nn", "n")

    seen = {shape(example) for example in skills["derivative"].train}
    assert seen.isdisjoint(shape(example) for example in skills["derivative"].valid)


def test_every_function_body_is_python(skills: dict[str, Skill]) -> None:
    for example in skills["python"].train + skills["python"].valid:
        head = example.prompt.split("function ", 1)[1].split("): ", 1)[0]
        body = "\n".join(f"    {line}" for line in example.completion.splitlines())
        ast.parse(f"async def {head}):\n{body}")


def test_brackets_and_rings_of_every_smiles_are_closed(skills: dict[str, Skill]) -> None:
    for example in skills["chemistry"].train + skills["chemistry"].valid:
        smiles = example.completion
        assert smiles.count("(") == smiles.count(")")
        assert smiles.count("[") == smiles.count("]")
        bare = "".join(part.split("]")[-1] for part in smiles.split("["))
        assert all(bare.count(digit) % 2 == 0 for digit in "123456789"), smiles


def test_french_is_one_line_and_not_the_english(skills: dict[str, Skill]) -> None:
    for example in skills["french"].train + skills["french"].valid:
        english, french = _answer(example)
        assert english != french
        assert "\n" not in french


def test_a_source_with_too_little_text_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "chemistry_candidates", lambda: iter(()))
    with pytest.raises(DemoError, match="skill 'chemistry' gives 0 training and 0 validation"):
        build_skills(seed=0)


def test_a_package_that_is_not_installed_is_told() -> None:
    with pytest.raises(DemoError, match="no_such_package is not installed; `make demo` installs"):
        package_folder("no_such_package")
    assert (package_folder("json") / "decoder.py").is_file()


def test_a_package_without_its_table_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelora.demo.sources import chemistry

    monkeypatch.setattr(chemistry, "package_folder", lambda name: tmp_path)
    with pytest.raises(DemoError, match="has no Identifiers/chemical identifiers pubchem small"):
        list(chemistry.chemistry_candidates())
