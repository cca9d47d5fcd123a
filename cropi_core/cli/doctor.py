"""Check this machine: what is installed, what is missing, what is broken, and how to correct it."""

import base64
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken"]

NEEDED = (
    "numpy",
    "torch",
    "transformers",
    "safetensors",
    "pyarrow",
    "zarr",
    "numcodecs",
    "pydantic",
    "pyyaml",
    "httpx",
)
OPTIONAL = {
    "math-verify": ("the verifier `math`", "math"),
    "reasoning-gym": ("`kind: reasoning_gym`", "gym"),
    "trl": ("training", "train"),
    "accelerate": ("training", "train"),
    "datasets": ("hub datasets", "train"),
    "prefect": ("`cropi run` and deployments", "flows"),
    "fastapi": ("the Prefect server of `cropi run`", "flows"),
    "prefect-ray": ("`runtime.ray`", "ray"),
    "s3fs": ("a root on S3", "s3"),
    "jinja2": ("`cropi report`", "report"),
    "matplotlib": ("figures of `cropi report`", "report"),
    "wordllama": ("similarity of texts in `cropi chosen`", "analysis"),
}


@dataclass(frozen=True)
class Check:
    """One result: ``missing`` is optional, with its use; ``broken`` prevents something required."""

    name: str
    state: State
    message: str
    remedy: str = ""


def examine(root: str) -> list[Check]:
    """Check the interpreter, packages, devices, memory, the root, vLLM and the embedded policy."""
    checks = [_python(), *_required_packages(), *_optional()]
    checks += _devices()
    checks += [_memory(), *_root(root), _verifiers(), _prefect(), _vllm(), _embedded()]
    return checks


def _python() -> Check:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check("python", "ok", f"{version} at {sys.executable}")
    return Check("python", "broken", version, "use Python 3.11 or 3.12")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _required_packages() -> list[Check]:
    checks = []
    for package in NEEDED:
        version = _version(package)
        remedy = "" if version else "pip install cropi"
        checks.append(Check(package, "ok" if version else "broken", version or "not installed", remedy))
    return checks


def _optional() -> list[Check]:
    checks = []
    for package, (use, extra) in OPTIONAL.items():
        version = _version(package)
        command = f"pip install 'cropi[{extra}]'" if extra else f"pip install {package}"
        if version:
            checks.append(Check(package, "ok", version))
        else:
            checks.append(Check(package, "missing", "not installed", f"for {use}: {command}"))
    return checks


def _devices() -> list[Check]:
    try:
        import torch
    except Exception as error:  # a broken build of torch raises OSError, ImportError or RuntimeError
        return [Check("torch import", "broken", f"{type(error).__name__}: {error}", "reinstall torch")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks = [Check("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} torch threads")]
    if not torch.cuda.is_available():
        remedy = "the embedded world needs none; for larger policies install a CUDA build of torch"
        checks.append(Check("gpu", "missing", f"none seen by torch {torch.__version__}", remedy))
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        description = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        checks.append(Check(f"cuda:{index}", "ok", description))
    return checks


def _memory() -> Check:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # the limit of the container, if there is one
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    total = min(pages, int(text)) if text.isdigit() else pages
    if total < 2e9:
        return Check("memory", "broken", f"{total / 1e9:.1f} GB", "at least 2 GB are needed")
    return Check("memory", "ok", f"{total / 1e9:.1f} GB")


def _root(root: str) -> list[Check]:
    """Check that the root, or the nearest existing directory above it, has free space and is writable.

    For an address, check its cache directory, then list the artifacts at the address.
    """
    from cropi_core.artifacts import Store
    from cropi_core.errors import CropiError

    try:
        store = Store(root)
    except CropiError as error:
        return [Check("root", "broken", str(error), "choose another --root or CROPI_ROOT")]
    place = store.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    state: State = "ok" if free > 1e9 else "broken"
    remedy = "" if state == "ok" else "free some space: `cropi artifacts gc` lists what nothing needs"
    checks = [Check("disk", state, f"{free / 1e9:.1f} GB free below {place}", remedy)]
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = "choose another --root or CROPI_ROOT, or make it writable"
        return [*checks, Check("root", "broken", f"{place}: {error.strerror}", remedy)]
    if store.remote is None:
        description = f"{root} is writable" if store.root.exists() else f"{root} can be made"
        return [*checks, Check("root", "ok", description)]
    try:
        count = len(store.keys())
    except CropiError as error:
        return [*checks, Check("root", "broken", str(error), "see docs/guides/s3-storage.md")]
    return [*checks, Check("root", "ok", f"{root} answers, {count} artifacts; its cache is {store.root}")]


def _verifiers() -> Check:
    """Start the process of the built-in verifiers, and report what the kernel refuses to it."""
    from cropi_core.errors import ConfigError
    from cropi_core.rewards import verifier_confinement

    try:
        confinement = verifier_confinement()
    except ConfigError as error:
        return Check("verifiers", "broken", str(error), "see docs/guides/rewards.md")
    if confinement.startswith("no limits"):
        return Check(
            "verifiers", "missing", confinement, "Linux 5.13 or later refuses them network and files"
        )
    return Check("verifiers", "ok", confinement)


def _prefect() -> Check:
    """Report the server that runs would connect to; does not import Prefect, which takes seconds."""
    if _version("prefect") is None:
        return Check("prefect server", "missing", "prefect is not installed", "pip install 'cropi[flows]'")
    if url := os.environ.get("PREFECT_API_URL"):
        return prefect_server(url)
    profile = os.environ.get("PREFECT_PROFILE", "of its profile")
    return Check(
        "prefect server", "ok", f"{profile} (PREFECT_API_URL is not set; `cropi run` starts its own)"
    )


def prefect_server(url: str) -> Check:
    """Ask the server at this API address for its version, with the password or key of the environment."""
    import httpx

    headers, name = {}, "prefect server"
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    insecure = os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true")
    try:
        place = f"{url.rstrip('/')}/admin/version"
        answer = httpx.get(place, headers=headers, timeout=10, verify=not insecure)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        remedy = "start it (`cropi serve`, `prefect server start`), or unset PREFECT_API_URL"
        return Check(name, "broken", f"{url} does not answer ({type(error).__name__}: {error})", remedy)
    if answer.status_code in (401, 403):
        remedy = "set PREFECT_API_AUTH_STRING to what the server was started with"
        sent = "the password" if headers else "access without a password"
        return Check(name, "broken", f"{url} refuses {sent} ({answer.status_code})", remedy)
    try:
        version = answer.json() if answer.is_success else None
    except ValueError:
        version = None
    if isinstance(version, str):
        return Check(name, "ok", f"{url}, Prefect {version}")
    if "/workspaces/" in url and answer.status_code == 404:
        return Check(name, "ok", f"{url} answers")  # Prefect Cloud has no such page
    remedy = "PREFECT_API_URL ends with /api"
    return Check(name, "broken", f"{url} is not a Prefect API (status {answer.status_code})", remedy)


def _vllm() -> Check:
    """Find the interpreter that vLLM servers are started with, and check that it can import vLLM."""
    from cropi_core.errors import ConfigError
    from cropi_core.rollouts.vllm import INSTALL_HINT, find_interpreter, remembered_version

    use = "for `rollouts.engine: vllm` with servers that are started"
    try:
        python = find_interpreter()
    except ConfigError as error:
        named = "is not an executable file" in str(error)
        return Check(
            "vllm", "broken" if named else "missing", str(error).partition(":")[0], f"{use}: {INSTALL_HINT}"
        )
    try:
        version, remembered = remembered_version(python)
        note = " (imported before; its packages are unchanged)" if remembered else ""
        return Check("vllm", "ok", f"{version} at {python}{note}")
    except ConfigError as error:
        return Check("vllm", "broken", str(error), f"{use}: {INSTALL_HINT}")


def _embedded() -> Check:
    """Load the weights and the tokenizer of the embedded policy; building the model would add 4 s of imports."""
    try:
        import transformers  # noqa: F401 - it checks the versions that it needs
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        from cropi_core.policy import checkpoint_files, resolve_checkpoint

        files = {path.name: path for path in checkpoint_files(resolve_checkpoint("embedded"))}
        if not all(weight.isfinite().all() for weight in load_file(files["model.safetensors"]).values()):
            raise ValueError("weights are not finite")
        Tokenizer.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # any error here is reported to the user
        return Check("embedded policy", "broken", f"{type(error).__name__}: {error}", "reinstall cropi")
    return Check("embedded policy", "ok", "whole")
