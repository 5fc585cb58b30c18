"""The demo's own four skills, built from text that Python or an installed package carries.

Nothing is downloaded and nothing is stored: the examples are made anew on each run, the same
for the same seed and package versions.

| skill | task | source | licence |
| --- | --- | --- | --- |
| chemistry | IUPAC name -> SMILES | `chemicals`, its small table of PubChem | MIT |
| derivative | expression -> derivative | our generator, differentiated by `sympy` | BSD-3-Clause |
| french | English message -> French | `django`, its translation catalogues | BSD-3-Clause |
| python | signature and docstring -> function body | Python's standard library | PSF-2.0 |
"""

from moelora.demo.sources.build import PACKAGES, build_skills

__all__ = ["PACKAGES", "build_skills"]
