"""One place turns the exceptions of libraries into errors: `cropi_core.errors`.

A list of exception classes at a border is wrong as soon as a library raises one more: pyarrow alone raises four for a
damaged file. So product code reads foreign content below `foreign_errors` or `recorded_errors`, which take any class.
"""

import ast

import pytest

from tests.packaging.test_house import Function, parsed

LIBRARIES = ("csv", "jinja2", "pa", "pyarrow", "regex", "safetensors", "tomllib", "yaml", "zarr")
CLASSES = ("JSONDecodeError", "SafetensorError", "TemplateError", "TemplateSyntaxError", "UndefinedError")

EXEMPT = {
    "cropi_core/artifacts/parquet.py:read_csv": "the line is known only after the error",
    "cropi_core/artifacts/table_files.py:_codes": "no error: an Arrow type without codes is compared by value",
    "cropi_core/cli/app.py:step": "the outermost border, for which outer_error is made",
    "cropi_core/curriculum/execution.py:_run_in_process": "cropi's own work; only a full disk is converted",
    "cropi_core/curriculum/run.py:_recorded": "adds how to resume to whatever ended the run",
    "cropi_core/policy/loading.py:panic_errors": "a panic of the tokenizer is not an Exception",
    "cropi_core/rewards/http.py:_verdict": "a reward that is null, which has reasons of its own",
    "cropi_core/rewards/reasoning_gym.py:_scorer": "a reward that is null",
    "cropi_core/rewards/reasoning_gym.py:score": "a reward that is null",
    "cropi_core/rewards/reasoning_gym.py:unpack": "a reward that is null",
    "cropi_core/system/messages.py:_decode": "no error: a line that is not a message",
    "cropi_core/training/stage.py:_optimize": "only memory that ran out is converted",
    "cropi_core/training/trainer.py:_sample": "only logits that are not finite are converted",
}
"""Functions that may name classes of libraries, or turn several into one error; and why."""


def caught(handler: ast.ExceptHandler) -> list[str]:
    """Return the classes that a handler names."""
    if handler.type is None:
        return []
    elements = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(element) for element in elements]


def is_of_library(name: str) -> bool:
    return name.partition(".")[0] in LIBRARIES or name.rpartition(".")[2] in CLASSES


def raises_another(handler: ast.ExceptHandler) -> bool:
    """Whether a handler raises an exception that it makes."""
    return any(isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) for node in ast.walk(handler))


def conversions(path: str, tree: ast.Module) -> set[str]:
    """Return the functions of a file that turn exceptions of a library, or of several classes, into another."""
    names = set()
    for function in ast.walk(tree):
        if not isinstance(function, Function):
            continue
        for handler in ast.walk(function):
            if isinstance(handler, ast.ExceptHandler):
                classes = caught(handler)
                several = len(classes) > 1 or classes in (["Exception"], ["BaseException"])
                if any(map(is_of_library, classes)) or (several and raises_another(handler)):
                    names.add(f"{path}:{function.name}")
    return names


def test_exceptions_of_libraries_become_errors_in_one_place():
    converting = {name for path, tree in parsed().items() for name in conversions(path, tree)}
    converting -= {f"cropi_core/errors.py:{name}" for name in ("foreign_errors", "recorded_errors")}
    new = sorted(converting - EXEMPT.keys())
    assert not new, "read foreign content below cropi_core.errors.foreign_errors:\n" + "\n".join(new)
    assert converting == EXEMPT.keys(), f"remove from EXEMPT: {sorted(EXEMPT.keys() - converting)}"


@pytest.mark.parametrize(
    "source",
    [
        "try: read()\nexcept (pa.ArrowInvalid, OSError): return None",
        "try: read()\nexcept yaml.YAMLError as error: raise ConfigError(str(error)) from error",
        "try: read()\nexcept (ValueError, KeyError) as error: raise DataError('damaged') from error",
        "try: read()\nexcept Exception as error: raise DataError('damaged') from error",
    ],
)
def test_a_list_of_classes_at_a_border_is_seen(source):
    body = "\n".join(f"    {line}" for line in source.splitlines())
    assert conversions("file.py", ast.parse(f"def read_it():\n{body}")) == {"file.py:read_it"}
