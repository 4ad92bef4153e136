from __future__ import annotations

import re

from isthmus.models import errors


def drawn_tree() -> dict[str, str]:
    """Child -> parent as the module's docstring draws them."""
    assert errors.__doc__
    parents: dict[str, str] = {}
    above = ["IsthmusError"]
    for branch, name in re.findall(r"^ {4}([│ ]*[├└]── )(\w+)", errors.__doc__, re.MULTILINE):
        depth = len(branch) // 4
        parents[name] = above[depth - 1]
        above[depth:] = [name]
    return parents


def test_the_classes_are_the_tree_that_the_docstring_draws() -> None:
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert {name: kind.__base__.__name__ for name, kind in classes.items()} == {  # type: ignore[union-attr]
        **drawn_tree(),
        "IsthmusError": "Exception",
    }
