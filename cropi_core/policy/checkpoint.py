"""Checkpoint directories: find them, check them, compute their digests. Imports no torch.

A run that finds everything done asks only which checkpoint it starts from; importing torch and transformers for that
costs 6 s of one core.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi_core.artifacts import file_sha256, parse_json, refuse_pointer
from cropi_core.errors import PolicyError, foreign_errors

MOST_JSON = 4 << 20
"""Bytes of ``config.json`` and of the other settings; an index of 100,000 tensors has some 10 MB."""
MOST_INDEX = 64 << 20
MOST_FILE = 256 << 20
"""Bytes of a tokenizer's file; the largest on the hub, of 262,144 tokens, has 33 MB."""
MOST_TEMPLATE = 1 << 20
"""Bytes of a chat template; the longest on the hub have some 20 kB."""
MOST_LAYERS = 1024
"""Layers of a model; building each takes a millisecond, and the deepest there are have 126."""
MOST_EXPERTS = 4096
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None)
"""What a configuration may ask for; any other name is that of code on the hub, which transformers would fetch."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
"""Names of the files that hold a tokenizer's vocabulary; ``*.model`` are those of SentencePiece and tiktoken."""
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")
"""Names of the input embeddings and of the output layer in transformers' models."""
QUANTISED = ("quantization_config", "compression_config")
"""Fields of ``config.json`` that say that weights are quantised (GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors)."""

CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What is taken from a checkpoint: weights, configuration, tokenizer. Never ``*.bin``, ``*.pt`` or ``*.py``."""


@dataclass(frozen=True)
class Checkpoint:
    """A policy on disk, as the steps take it.

    Attributes:
        path: Checkpoint directory.
        dtype: Type of the weights in forward passes.
        digest: Content digest of the directory if it is known; see :meth:`content_digest`.
    """

    path: Path
    dtype: str = "float32"
    digest: str | None = None

    def content_digest(self) -> str:
        """Return the content digest of the directory; compute it if it is not known."""
        return self.digest or tree_digest(self.path)


def resolve_checkpoint(path: str, revision: str | None = None) -> Path:
    """Find a checkpoint: an embedded one, a directory, or a hub id (downloaded once into the hub's cache).

    Raises:
        PolicyError: It is not found.
    """
    if path == "embedded":
        from cropi_core.world import base_checkpoint

        return base_checkpoint()
    if path == "embedded-ladder":
        from cropi_core.world import ladder_checkpoint

        return ladder_checkpoint()
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise PolicyError(
            f"policy.path={path!r} is not a directory; give a checkpoint directory, a hub id or `embedded`"
        )
    from huggingface_hub import snapshot_download

    with foreign_errors(
        f"policy.path={path!r} is not a directory here and could not be fetched from the hub",
        PolicyError,
        "Check the name, the network and HF_HUB_OFFLINE",
    ):
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(CHECKPOINT_FILES)))


def checkpoint_files(directory: Path) -> list[Path]:
    """List the files of a checkpoint that are used, sorted by name.

    Raises:
        PolicyError: No configuration, no safetensors weights, no tokenizer; quantised weights; or the architecture
            needs remote code.
    """
    files = sorted({p for pattern in CHECKPOINT_FILES for p in directory.glob(pattern) if p.is_file()})
    names = {p.name for p in files}
    _check_links(directory, files)
    if "config.json" not in names:
        raise PolicyError(f"{directory} has no config.json; it is not a Hugging Face checkpoint")
    if not any(name.endswith(".safetensors") for name in names):
        raise PolicyError(
            f"{directory} has no *.safetensors; pickled weights (*.bin, *.pt) are not read: convert them"
        )
    if not any(name in VOCABULARIES or name.endswith(".model") for name in names):
        raise PolicyError(
            f"{directory} has no tokenizer ({', '.join(VOCABULARIES)} or *.model). Copy the tokenizer's files of the "
            "model that it was trained from into it"
        )
    for path in files:
        refuse_pointer(path, PolicyError)
        _check_size(path)
    config = read_settings(directory / "config.json")
    if "model_type" not in config:
        raise PolicyError(
            f"{directory / 'config.json'} names no model_type; it is not a Hugging Face checkpoint"
        )
    if "auto_map" in config:
        raise PolicyError(f"{directory} wants its own code run (auto_map in config.json); that is never done")
    _check_settings(directory, config)
    if "generation_config.json" in names:
        read_settings(directory / "generation_config.json")  # transformers ignores one that it cannot read
    for path in files:
        if path.name.endswith(".index.json"):
            _check_index(path, names)
    return files


def _check_links(directory: Path, files: list[Path]) -> None:
    """Refuse links that leave a checkpoint, except those of the hub's cache to its own blobs."""
    resolved = directory.resolve()
    allowed = [resolved]
    if resolved.parent.name == "snapshots":
        allowed.append(resolved.parent.parent / "blobs")
    for path in files:
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(one) for one in allowed):
            raise PolicyError(
                f"{path} is a link to {target}, outside the checkpoint; its content would become part of the policy. "
                "`cp -rL` makes a checkpoint without links"
            )


def _check_size(path: Path) -> None:
    """Hold the files that are read as a whole to what such files have."""
    if path.suffix == ".safetensors":
        return
    most = MOST_FILE
    if path.name.endswith(".index.json"):
        most = MOST_INDEX
    elif path.name == "config.json" or path.name.endswith("_config.json"):
        most = MOST_JSON
    elif path.suffix == ".jinja":
        most = MOST_TEMPLATE
    if (size := path.stat().st_size) > most:
        raise PolicyError(f"{path} has {size:,} bytes; at most {most:,} are read")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a small JSON object of a checkpoint.

    Raises:
        PolicyError: It is not JSON, not an object, or nests too deeply.
    """
    try:
        settings = parse_json(path.read_bytes())
    except ValueError as error:
        raise PolicyError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise PolicyError(f"{path} holds {type(settings).__name__}, not a JSON object")
    return settings


def _check_settings(directory: Path, config: dict[str, Any]) -> None:
    """Refuse what a configuration may not ask for: code of the hub, or more layers than a model has."""
    pending: list[Any] = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += [one for one in part if isinstance(one, dict | list)]
            continue
        for name, value in part.items():
            if isinstance(value, dict | list):
                pending.append(value)
            if name in QUANTISED and value:
                method = value.get("quant_method", name) if isinstance(value, dict) else name
                raise PolicyError(
                    f"{directory} has quantised weights ({method} in config.json), which have no gradients. Give the "
                    "checkpoint that it was quantised from, or one with the weights converted back to bfloat16"
                )
            if name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
                for one in value.values() if isinstance(value, dict) else [value]:
                    if one not in ATTENTION:
                        raise PolicyError(
                            f"{directory / 'config.json'} asks for {name}={one!r}, code that would be fetched from the "
                            f"hub; remove it from the file"
                        )
            most = _module_limit(name)
            count = len(value) if isinstance(value, list) else value
            if most and isinstance(count, int | float) and count > most:
                raise PolicyError(
                    f"{directory / 'config.json'} says {name}={count}; at most {most} are built"
                )
    if (directory / "adapter_config.json").exists():
        raise PolicyError(
            f"{directory} has an adapter next to its weights (adapter_config.json), which may name other files as its "
            "base; merge it into the weights"
        )


def _module_limit(name: str) -> int | None:
    """Return the limit of a field of ``config.json`` that says how many modules are built."""
    if name.startswith("layer_types") or re.fullmatch(r"(num_|n_)\w*layers?|\w+_layers", name):
        return MOST_LAYERS
    return MOST_EXPERTS if re.fullmatch(r"(num_|n_)\w*experts?", name) else None


def _check_index(path: Path, names: set[str]) -> None:
    """Refuse an index that names anything but safetensors files in its directory.

    transformers joins these names to the directory: ``../x.safetensors`` and an absolute ``.bin``, read by torch, would
    be loaded although no digest covers them.
    """
    weights = read_settings(path).get("weight_map", {})
    if not isinstance(weights, dict):
        raise PolicyError(f"{path}: weight_map is not an object of tensors and files")
    pickled = path.name == "pytorch_model.bin.index.json"  # never read; its names must stay in the directory
    for name in sorted({str(value) for value in weights.values()}):
        if name != Path(name).name or not (pickled or (name in names and name.endswith(".safetensors"))):
            raise PolicyError(
                f"{path} names {name!r}; an index may only name *.safetensors files in its directory"
            )


def check_targets(directory: Path, targets: str | Sequence[str]) -> None:
    """Refuse adapters on embeddings that the output layer shares, as ``config.json`` declares.

    An adapter on one of the two changes both when it is merged: the checkpoint would not be the trained policy.

    Args:
        directory: Checkpoint directory.
        targets: Setting ``training.lora.targets``.

    Raises:
        PolicyError: A target names the embeddings or the output layer, and they are tied.
    """
    if isinstance(targets, str) or not read_settings(directory / "config.json").get("tie_word_embeddings"):
        return
    if named := [one for one in targets if one.rpartition(".")[2] in EMBEDDINGS]:
        raise tied_targets(directory, named)


def tied_targets(policy: object, named: Sequence[str]) -> PolicyError:
    """Return the error for adapters on embeddings that are tied to the output layer."""
    return PolicyError(
        f"training.lora.targets names {', '.join(named)}, and {policy} uses one matrix for the embeddings and the "
        "output layer (tie_word_embeddings): merged, an adapter on one would change both, and the stored policy would "
        "not be the one that was trained. Remove it from the targets, or train all weights"
    )


def weight_count(directory: Path) -> int:
    """Count the elements of a checkpoint's tensors, as the headers of its files declare them.

    Raises:
        PolicyError: A header cannot be read, or declares more than its file holds.
    """
    from safetensors import safe_open

    total = 0
    for path in directory.glob("*.safetensors"):
        with (
            foreign_errors(f"{path} is not a whole safetensors file", PolicyError),
            safe_open(path, framework="numpy") as file,
        ):
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def tree_digest(directory: Path) -> str:
    """Hash the names and contents of a checkpoint's files: the policy's identity, wherever it lies."""
    total = hashlib.sha256()
    for path in checkpoint_files(directory):
        total.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    return total.hexdigest()
