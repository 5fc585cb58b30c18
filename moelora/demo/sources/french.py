"""English messages and their French translations from Django's catalogues (BSD-3-Clause)."""

import gettext
import re
from collections.abc import Iterator
from pathlib import Path

from moelora.demo.skills import Example
from moelora.demo.sources.packages import package_folder
from moelora.demo.sources.split import Candidate

CATALOGUES = "locale/fr/LC_MESSAGES/*.mo"
CONTEXT_END = "\x04"
FEWEST_WORDS = 2
LONGEST_MESSAGE = 120


def french_candidates() -> Iterator[Candidate]:
    """Yield ``English -> French`` of short messages, grouped by their first two words."""
    for path in sorted(package_folder("django").rglob(CATALOGUES)):
        for english, french in _messages(path):
            if english != french and _is_sentence(english) and _is_sentence(french):
                example = Example(f"Translate to French: {english}", french)
                yield Candidate(example, group=_group(english))


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        # gettext has no public way to list a catalogue
        catalogue: dict[str | tuple[str, int], str] = vars(gettext.GNUTranslations(file))[
            "_catalog"
        ]
    for key, french in catalogue.items():
        # of the plural forms only the first has its own English text in the key
        english, form = key if isinstance(key, tuple) else (key, 0)
        if form == 0:
            yield english.split(CONTEXT_END)[-1].strip(), french.strip()


def _is_sentence(message: str) -> bool:
    return (
        len(message.split()) >= FEWEST_WORDS
        and len(message) <= LONGEST_MESSAGE
        and not re.search(r"[\n<>%{]|&\w+;", message)
    )


def _group(english: str) -> str:
    return " ".join(re.findall(r"[a-z]+", english.lower())[:2])
