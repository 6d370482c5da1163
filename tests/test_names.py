"""A name means one thing: no two modules of the package define the same one."""

import ast
from collections import defaultdict

from helpers import ROOT

PACKAGE = ROOT / "grap_solo"
# The same thing twice: a rule's and a method's own base class is what it is imported from.
SHARED = {"__all__", "main"}


def definitions(file):
    """The classes, functions and constants that a module defines at its top level."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (each.id for each in node.targets if isinstance(each, ast.Name))


def test_no_name_is_defined_in_two_modules():
    homes = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in definitions(file):
            homes[name].append(str(file.relative_to(PACKAGE)))
    twice = {name: files for name, files in homes.items() if len(files) > 1 and name not in SHARED}
    assert not twice, "\n".join(f"{name}: {', '.join(files)}" for name, files in twice.items())
