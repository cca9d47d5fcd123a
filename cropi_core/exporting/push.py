"""Upload a selection, a set of prompts or a policy to a hub of Hugging Face, in one commit to a private repository.

    push_artifact(Store(".cropi"), "demo-1a2b3c4d:selection@1", "me/chosen")

Nothing else in cropi uploads anything. Prompts become a dataset in the format ``hf`` with its card, a policy a model
with its checkpoint and a card.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cropi_core.artifacts import CHECKPOINT, Store
from cropi_core.errors import ConfigError, ServerError, foreign_errors
from cropi_core.exporting.card import policy_card
from cropi_core.exporting.selection import CARD, export_prompts, sound
from cropi_core.runs import resolve_key
from data_schemas import Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPLACED = {"dataset": ["data/*"], "model": ["*.safetensors", "*.safetensors.index.json"]}
"""Files of the repository that a commit replaces as a whole: parts of an earlier artifact must not stay."""


@dataclass(frozen=True)
class Pushed:
    """The outcome of an upload.

    Attributes:
        repo: Name of the repository.
        kind: ``dataset`` or ``model``.
        files: What the commit has, with sizes in bytes.
        private: Whether the repository is private.
        created: Whether it was created.
        url: Address of the commit; empty if nothing was sent.
    """

    repo: str
    kind: Literal["dataset", "model"]
    files: dict[str, int]
    private: bool
    created: bool
    url: str


def push_artifact(
    store: Store,
    name: str,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    prompts: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Upload an artifact with the account that is logged in (``hf auth login``, ``HF_TOKEN``).

    Args:
        store: Store of the artifacts.
        name: Key, tag or ``RUN:slot`` of a selection, a set of prompts or a policy.
        repo: ``OWNER/NAME``; created if it does not exist.
        public: Create a public repository, or accept that an existing one is public. An existing one is not changed.
        dry_run: Send nothing; return what would be sent.
        prompts: The pool of a selection that was imported.
        endpoint: Address of the hub; by default ``HF_ENDPOINT``, or the public hub.

    Raises:
        ArtifactError: The artifact is missing or damaged.
        ConfigError: It is of another kind, the name of the repository is not of that form, or the repository is public
            and ``public`` is not set.
        ServerError: The hub refused, or cannot be reached. The commit is made as a whole or not at all.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"--repo {repo} is not of the form OWNER/NAME")
    manifest = store.manifest(sound(store, resolve_key(store, name)))
    if manifest.kind not in ("selection", "prompts", "policy"):
        raise ConfigError(
            f"{manifest.key} is of kind {manifest.kind}; a selection, a set of prompts or a policy can be pushed"
        )
    kind = "model" if manifest.kind == "policy" else "dataset"
    with tempfile.TemporaryDirectory(prefix="cropi-push-") as parent:
        folder = Path(parent) / "repository"
        if manifest.kind == "policy":
            _write_policy(store, manifest, folder)
        else:
            export_prompts(store, name, folder, "hf", prompts=prompts)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
        if dry_run:
            return Pushed(repo, kind, files, private=not public, created=False, url="")
        with foreign_errors(
            f"{repo} was not written",
            ServerError,
            "Check the account (`hf auth whoami`), the name, and HF_HUB_OFFLINE; the same command tries again",
        ):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT") or None)
            private, created = _repository(api, repo, kind, public)
            message = f"{manifest.kind} {manifest.key} ({manifest.digest[:12]})"
            url = _commit(api, repo, kind, {name: folder / name for name in files}, message)
    return Pushed(repo, kind, files, private=private, created=created, url=url)


def _repository(api: "HfApi", repo: str, kind: str, public: bool) -> tuple[bool, bool]:
    """Find or create the repository; return whether it is private, and whether it was created."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(repo, repo_type=kind)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type=kind, private=not public)
        return not public, True
    private = bool(getattr(found, "private", False))
    if not private and not public:
        raise ConfigError(
            f"the repository {repo} exists and is public. Give --public to upload to it, or name another one"
        )
    return private, False


def _commit(api: "HfApi", repo: str, kind: str, files: dict[str, Path], message: str) -> str:
    """Commit files, and the deletion of those that they replace; return the address of the commit.

    The client's ``upload_folder`` makes several commits of a large folder, so that a stop leaves parts of it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [
        name
        for name in api.list_repo_files(repo, repo_type=kind)
        if name not in files and any(fnmatch(name, pattern) for pattern in REPLACED[kind])
    ]
    operations = [
        *[CommitOperationDelete(name) for name in stale],
        *[CommitOperationAdd(name, path) for name, path in files.items()],
    ]
    commit = api.create_commit(repo, operations, commit_message=message, repo_type=kind)
    return str(commit.commit_url)


def _write_policy(store: Store, manifest: Manifest, folder: Path) -> None:
    """Copy a checkpoint; a card is added if it has none."""
    shutil.copytree(store.directory(manifest.key) / CHECKPOINT, folder)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(policy_card(store, manifest), encoding="utf-8")
