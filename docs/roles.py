"""Docstrings as Markdown: Sphinx's roles become links, what else would read wrongly is mended."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Goes through a package that is loaded whole, so that every name can be found."""
        self._rewrite(pkg)

    def _rewrite(self, node: griffe.Object) -> None:
        if node.docstring is not None:
            text = ROLE.sub(lambda role: _link(node, role[1]), node.docstring.value)
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            node.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        for member in node.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _link(node: griffe.Object, name: str) -> str:
    """`name` as a link to what it means here, if a page has that."""
    short = name.rpartition(".")[2] if name.startswith("densecl_ext.") else name
    try:
        target = name if name.startswith("densecl_ext.") else node.resolve(name)
        target = node.modules_collection[target].canonical_path
    except (griffe.GriffeError, KeyError):
        return f"`{short}`"
    return f'<autoref identifier="{target}" optional><code>{short}</code></autoref>'
