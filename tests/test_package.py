"""What other projects get: the package, with all of its files and its types."""

from __future__ import annotations

import ast
import tomllib

import crt
from tests.conftest import ROOT


def test_the_wheel_takes_every_file_that_the_package_reads():
    """Oracle: what lies in crt/ beside its modules."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    taken = {path for pattern in settings["package-data"]["crt"] for path in (ROOT / "crt").glob(pattern)}
    others = {path for path in (ROOT / "crt").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - taken == set()


def test_type_checkers_see_the_types_of_the_lazy_names():
    """They follow imports, not `__getattr__`, and a package only where it has py.typed (PEP 561)."""
    assert (ROOT / "crt" / "py.typed").exists()
    (typed,) = (node for node in ast.parse((ROOT / "crt/__init__.py").read_text()).body if isinstance(node, ast.If))
    imported = {name.name for node in typed.body for name in node.names}
    assert ast.unparse(typed.test) == "TYPE_CHECKING"
    assert imported == set(crt.__all__)
