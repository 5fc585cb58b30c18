"""IUPAC names and SMILES from the `chemicals` package's table of PubChem (MIT)."""

import re
from collections.abc import Iterator

from moelora.demo.errors import DemoError
from moelora.demo.skills import Example
from moelora.demo.sources.packages import package_folder
from moelora.demo.sources.split import Candidate

TABLE = "Identifiers/chemical identifiers pubchem small.tsv"
SMILES_COLUMN = 4
NAME_COLUMN = 7
NAME_LENGTHS = range(6, 41)
SMILES_LENGTHS = range(4, 33)


def chemistry_candidates() -> Iterator[Candidate]:
    """Yield ``name -> SMILES`` of small molecules, isomers of one name in one group."""
    path = package_folder("chemicals") / TABLE
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DemoError(f"The package chemicals has no {TABLE}; install chemicals 1.5.") from error
    for row in rows:
        columns = row.split("\t")
        if len(columns) <= NAME_COLUMN:
            continue
        name, smiles = columns[NAME_COLUMN], columns[SMILES_COLUMN]
        # a semicolon joins the parts of a salt
        if len(name) in NAME_LENGTHS and len(smiles) in SMILES_LENGTHS and ";" not in name:
            yield Candidate(Example(f"Write the SMILES of {name}.", smiles), group=_group(name))


def _group(name: str) -> str:
    # positions and stereo marks: 2-methylhexane and 3-methylhexane belong together
    return re.sub(r"\W+", " ", re.sub(r"\b(?:\d+[a-z]?|[a-z])\b", "", name)).strip()
