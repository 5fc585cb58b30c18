"""Finding the files of an installed package without importing it."""

import importlib.util
from pathlib import Path

from moelora.demo.errors import DemoError


def package_folder(name: str) -> Path:
    """Return the folder of an installed package.

    Args:
        name: the package's import name.

    Raises:
        DemoError: if the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DemoError(f"The package {name} is not installed; `make demo` installs it.")
    return Path(spec.origin).parent
