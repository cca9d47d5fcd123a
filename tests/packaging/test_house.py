"""The tree: functions stay short, signatures narrow, and a package is used through its door.

A package's door is the ``__all__`` of its ``__init__``. What is not in it is private to the package: modules outside
the package import from the package, never from a module in it. A module directly in `cropi_core` is its own door.
"""

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.paths import CHECKOUT

ROOT = CHECKOUT
PRODUCT = ("data_schemas", "cropi_core", "tasks", "flows", "deployments")
MOST_LINES = 60
MOST_ARGUMENTS = 9

FORMS = {
    # Commands of Typer and flows of Prefect: each parameter is an option, or a field of the form in Prefect's UI.
    "cropi_core/cli/exchange.py:import_log",
    "cropi_core/cli/steps.py:selection",
    "cropi_core/cli/steps.py:training",
    "cropi_core/cli/verify_rewards.py:verify_rewards",
    "flows/command/app.py:study_command",
    "flows/curriculum.py:curriculum",
    "flows/select.py:select",
    "flows/single_steps.py:evaluation",
    "flows/single_steps.py:gradients",
    "flows/single_steps.py:rollouts",
    "flows/single_steps.py:scores",
    "flows/single_steps.py:selection",
    "flows/single_steps.py:training",
}
"""Functions whose signature is a user's form."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed() -> dict[str, ast.Module]:
    """Return the syntax tree of each product file, by its path from the root."""
    paths = [path for package in PRODUCT for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def functions() -> Iterator[tuple[str, Function]]:
    """Yield each function with its name for people, ``file:function``."""
    for path, tree in parsed().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.name}", node


def length(function: Function) -> int:
    """Count the lines from ``def`` to the end, without the docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = ast.get_docstring(function) is not None and has_docstring
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if docstring else 0)


def arguments(function: Function) -> int:
    """Count the arguments without ``self`` and ``cls``."""
    of = function.args
    names = [each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    names += [each.arg for each in (of.vararg, of.kwarg) if each]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def module_of(path: str) -> str:
    """Return the dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def packages() -> dict[str, ast.Module]:
    """Return the ``__init__`` of each package, by its dotted name."""
    return {module_of(path): tree for path, tree in parsed().items() if path.endswith("/__init__.py")}


@cache
def public_names(package: str) -> set[str]:
    """Return the names of a package's door: those of its stub, or of the list in its ``__init__``."""
    stub = ROOT / package.replace(".", "/") / "__init__.pyi"
    if stub.is_file():
        tree = ast.parse(stub.read_text(encoding="utf-8"))
        return {
            name.asname or name.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
    for node in packages()[package].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def is_inside(importer: str, package: str) -> bool:
    return importer == package or importer.startswith(f"{package}.")


def foreign_imports() -> Iterator[str]:
    """Yield a message for every import from outside a package that does not use its door."""
    modules = {module_of(path) for path in parsed()}
    for path, tree in parsed().items():
        importer = module_of(path)
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                targets = [(node.module, name.name) for name in node.names]
            elif isinstance(node, ast.Import):
                targets = [(name.name, "") for name in node.names if name.name in modules]
            for module, name in targets:
                package = module if module in packages() else module.rpartition(".")[0]
                if is_inside(importer, package) or package == "cropi_core":
                    continue
                place = f"{path}:{node.lineno}"
                if module not in packages():
                    yield f"{place} imports {name} from {module}; import it from {package}"
                elif name not in public_names(package):
                    yield f"{place} imports {name}, which is not in the door of {package}"


def test_functions_are_short():
    long = [f"{name}: {length(node)} lines" for name, node in functions() if length(node) > MOST_LINES]
    assert not long, f"a function has at most {MOST_LINES} lines:\n" + "\n".join(long)


def test_signatures_are_narrow():
    wide = {name: arguments(node) for name, node in functions() if arguments(node) > MOST_ARGUMENTS}
    new = [f"{name}: {count} arguments" for name, count in wide.items() if name not in FORMS]
    assert not new, f"a signature has at most {MOST_ARGUMENTS} arguments:\n" + "\n".join(new)
    assert wide.keys() == FORMS, f"narrow enough, so remove from FORMS: {FORMS - wide.keys()}"


@pytest.mark.parametrize("package", sorted(packages()))
def test_a_package_says_what_is_in_it(package):
    assert ast.get_docstring(packages()[package]), f"{package}/__init__.py has no docstring"


def test_a_package_is_used_through_its_door():
    faults = list(foreign_imports())
    assert not faults, "\n".join(faults)
