"""What a validation can be told, and the checks that need no model."""

from dataclasses import dataclass
from pathlib import Path

from moelora.validation.errors import ValidationError

DTYPES = ("float32", "bfloat16", "float16", "float64")
RESULT_FILES = ("report.json", "report.md", "report.html")
MOST_EXPERTS = 256


@dataclass(frozen=True)
class ValidationOptions:
    """The arguments of one validation, checked.

    Args:
        out: folder to write; an earlier report's is replaced, one that holds else is refused.
        base: base model's folder or hub id; None takes what the checkpoint says.
        device: a torch device name.
        experts: numbers of experts to measure speed at; none skips the measuring.
        batch: rows of a batch.
        seq: tokens of a row.
        dtype: of the base model.
        repeats: timed calls of each way.
        warmup: calls of each way before them.
        batches: batches whose routing is looked at.
        text: a text file to run; None runs random tokens.
        tolerance: largest relative difference that counts as agreement; None takes the dtype's.
        lora_alpha: for old ``expert_<i>.pt`` files without a config that says it.
        seed: of random tokens and weights.

    Raises:
        ValidationError: if a value is out of its range.
    """

    out: Path
    base: str | None = None
    device: str = "cpu"
    experts: tuple[int, ...] = (2, 4, 8)
    batch: int = 2
    seq: int = 64
    dtype: str = "float32"
    repeats: int = 5
    warmup: int = 1
    batches: int = 8
    text: Path | None = None
    tolerance: float | None = None
    lora_alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value against its range."""
        least = {"batch": 1, "seq": 2, "repeats": 1, "warmup": 0, "batches": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise ValidationError(f"--{name} must be at least {low}, got {value}.")
        for number in self.experts:
            if not 2 <= number <= MOST_EXPERTS:
                raise ValidationError(
                    f"--experts must be numbers from 2 to {MOST_EXPERTS}, got {number}."
                )
        if self.dtype not in DTYPES:
            raise ValidationError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValidationError(f"--tolerance must be at least 0, got {self.tolerance}.")


def numbers(text: str) -> tuple[int, ...]:
    """Read ``2,4,8``.

    Args:
        text: numbers with commas between them; empty for none.

    Raises:
        ValidationError: if something else stands there.

    Example:
        >>> numbers("4,2,2")
        (2, 4)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise ValidationError(f"--experts must be numbers with commas, like 2,4,8, got {text!r}.")
    return tuple(sorted({int(part) for part in parts}))


def check_out(out: Path) -> None:
    """Refuse a folder whose content is not an earlier report.

    Args:
        out: the folder to create or replace.

    Raises:
        ValidationError: if it is a file, or holds other files.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValidationError(f"--out must be a folder to create or replace, but {out} is a file.")
    existing = next((each for each in out.parents if each.exists()), out)
    if existing != out and not existing.is_dir():
        raise ValidationError(f"--out {out} cannot be made, since {existing} is a file.")
    foreign = (
        sorted(p.name for p in out.iterdir() if p.name not in RESULT_FILES) if out.is_dir() else []
    )
    if foreign:
        raise ValidationError(
            f"--out {out} holds files that no validation wrote ({foreign[0]}); name a new folder."
        )
