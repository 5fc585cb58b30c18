"""Let the reference read moelora's docstrings: Sphinx roles become links, doctests code blocks."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)\.?([\w.]+)`")
_DOCTEST = re.compile(r"^Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed.

    Names in roles become links where they are public, and plain code elsewhere. ``Example:``
    becomes ``Examples:``, the section that Griffe reads doctests in.
    """

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Rewrite the docstring of a module, class, function or attribute.

        Args:
            obj: what Griffe found.
            loader: what found it.
            **kwargs: what other releases hand over.
        """
        if obj.docstring is None:
            return
        text = _ROLE.sub(
            lambda role: _link(role[2], obj, shorten=bool(role[1])), obj.docstring.value
        )
        obj.docstring.value = _DOCTEST.sub("Examples:", text)


def _link(name: str, obj: griffe.Object, *, shorten: bool) -> str:
    """A link to what a role names, as the reader writes it; code where there is no page for it."""
    shown = name.rsplit(".", 1)[-1] if shorten else name
    target = _public_path(name.removeprefix("moelora."), obj)
    return f"`{shown}`" if target is None else f"[`{shown}`][{target}]"


def _public_path(name: str, obj: griffe.Object) -> str | None:
    """The path under which a name is documented."""
    public = _public_names(obj.package)
    parts = name.split(".")
    for start, part in enumerate(parts):
        if part in public:
            return ".".join(["moelora", *parts[start:]])
    owner = obj if obj.is_class else obj.parent
    if len(parts) == 1 and owner is not None and owner.is_class and owner.name in public:
        return f"moelora.{owner.name}.{name}" if name in owner.all_members else None
    return None


def _public_names(package: Any) -> set[str]:
    """``moelora.__all__``, read from the source: members are not all loaded yet."""
    tree = ast.parse(package.filepath.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
