"""Building the four skills of the demo."""

from collections.abc import Callable, Iterable

from moelora.demo.errors import DemoError
from moelora.demo.skills import Skill
from moelora.demo.sources.chemistry import chemistry_candidates
from moelora.demo.sources.derivatives import derivative_candidates
from moelora.demo.sources.french import french_candidates
from moelora.demo.sources.python_functions import python_candidates
from moelora.demo.sources.split import Candidate, split_by_group

TRAIN_SIZE = 200
VALID_SIZE = 40
PACKAGES = ("chemicals", "django", "sympy")


def build_skills(*, seed: int) -> list[Skill]:
    """Build the demo's own skills, each with 200 training and 40 validation examples.

    Args:
        seed: chooses the examples and their split; the same for the same package versions.

    Raises:
        DemoError: if a source package is not installed or carries too little text.
    """
    recipes: dict[str, tuple[str, Callable[[], Iterable[Candidate]]]] = {
        "chemistry": ("IUPAC names and SMILES of the package chemicals, MIT", chemistry_candidates),
        "derivative": (
            "our generator, differentiated by sympy, BSD",
            lambda: derivative_candidates(seed=f"derivative {seed}"),
        ),
        "french": ("Django's English-French catalogues, BSD", french_candidates),
        "python": ("function bodies of Python's standard library, PSF", python_candidates),
    }
    return [
        _build_skill(name, source=source, candidates=candidates(), seed=seed)
        for name, (source, candidates) in recipes.items()
    ]


def _build_skill(name: str, *, source: str, candidates: Iterable[Candidate], seed: int) -> Skill:
    split = split_by_group(
        candidates, train_size=TRAIN_SIZE, valid_size=VALID_SIZE, seed=f"{name} {seed}"
    )
    if len(split.train) < TRAIN_SIZE or len(split.valid) < VALID_SIZE:
        raise DemoError(
            f"The installed source of the skill {name!r} gives {len(split.train)} training and "
            f"{len(split.valid)} validation examples, fewer than {TRAIN_SIZE} and {VALID_SIZE}."
        )
    return Skill(name, split.train, split.valid, source)
