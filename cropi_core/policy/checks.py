"""Checks of a checkpoint's weights and tokenizer, before anything is computed with them."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cropi_core.errors import PolicyError, foreign_errors

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors names them."""
ADAPTER = re.compile(r"\blora_(A|B|embedding)|\.base_layer\.")
"""Matches names of PEFT's tensors."""


def check_types(directory: Path) -> None:
    """Refuse weights that are integers or 8-bit numbers; only the headers of the files are read.

    Raises:
        PolicyError: Names the file and the tensor.
    """
    for path, file in _opened(directory):
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind not in FLOATING and name.endswith(
                ".weight"
            ):  # other names are buffers, such as positions
                raise PolicyError(
                    f"{path}: {name} is {kind}, as in quantised checkpoints; weights must be bfloat16, float16 or "
                    "float32"
                )


def check_stored(directory: Path) -> None:
    """Refuse files with a tensor that holds NaN or infinity; takes about as long as hashing the files.

    Raises:
        PolicyError: Names the file and the tensor.
    """
    for path, file in _opened(directory):
        for name in file.keys():  # noqa: SIM118
            if file.get_slice(name).get_dtype() in FLOATING:
                check_finite([(name, file.get_tensor(name))], path)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Refuse tensors that hold NaN or infinity; both pass through a minimum and a maximum, which need no memory.

    Raises:
        PolicyError: Names the first such tensor.
    """
    for name, tensor in tensors:
        if tensor.numel() and not all(math.isfinite(float(one)) for one in torch.aminmax(tensor.detach())):
            raise PolicyError(
                f"{where}: {name} holds NaN or infinity, so the policy computes nothing else. Give an earlier "
                "checkpoint of its training, or convert it again with a type of more range (bfloat16, not float16)"
            )


def _opened(directory: Path) -> Iterator[tuple[Path, Any]]:
    """Open the weights of a checkpoint, file by file."""
    for path in sorted(directory.glob("*.safetensors")):
        with (
            foreign_errors(f"{path} is not a whole safetensors file", PolicyError),
            safe_open(path, framework="pt") as file,
        ):
            yield path, file


def check_shapes(directory: Path, wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights of other shapes than a model has; only the headers of the files are read.

    Args:
        directory: The checkpoint.
        wanted: The model's weights, by name; a stored name that is not among them is not compared.

    Raises:
        PolicyError: Names the first such weight.
    """
    for path, file in _opened(directory):
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name).get_shape()
            if name in wanted and stored != list(wanted[name].shape):
                raise PolicyError(
                    f"{path}: {name} has the shape {stored}, and config.json describes {list(wanted[name].shape)}: the "
                    "weights and the configuration are of different models"
                )


def check_loaded(directory: Path, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of its model.

    Args:
        directory: The checkpoint.
        info: What transformers reports of loading: ``missing_keys`` and ``unexpected_keys``.

    Raises:
        PolicyError: Weights are missing, or belong to an adapter that would be ignored.
    """
    if missing := sorted(info["missing_keys"]):
        raise PolicyError(
            f"{directory} lacks weights that its configuration asks for: {', '.join(missing[:5])}"
        )
    if adapter := sorted(name for name in info["unexpected_keys"] if ADAPTER.search(name)):
        raise PolicyError(
            f"{directory} holds the adapter weight {adapter[0]}, which is part of no layer and would be ignored; "
            "merge the adapter into the weights (PEFT's merge_and_unload)"
        )


def check_tokenizer(tokenizer: Any, size: int, where: object) -> None:
    """Refuse a tokenizer without an end token, or with tokens that have no embedding.

    Added tokens beyond the embedding are accepted as long as nothing uses them: Gemma 3's tokenizer has one for images,
    which its text models do not have.

    Args:
        tokenizer: The tokenizer.
        size: Rows of the policy's embedding.
        where: The checkpoint, for messages.

    Raises:
        PolicyError: It is another model's, or no completion could end.
    """
    if (vocab_size := int(tokenizer.vocab_size)) > size:
        raise PolicyError(
            f"{where}: the tokenizer has {vocab_size} tokens and the policy embeds {size}. It belongs to another "
            "model; copy the tokenizer's files of the model that the policy was trained from"
        )
    if (end := tokenizer.eos_token_id) is None:
        raise PolicyError(f"{where}: the tokenizer has no end-of-sequence token, so no completion could end")
    if not 0 <= int(end) < size:
        raise PolicyError(
            f"{where}: the end token {tokenizer.eos_token!r} has the id {end}, and the policy embeds {size} tokens. "
            "Set eos_token in tokenizer_config.json to the token that the policy was trained with, or resize the "
            "embedding"
        )


def unknown_token(ids: Iterable[int], size: int) -> int | None:
    """Return the first token id without an embedding, or None."""
    return next((i for i in ids if not 0 <= i < size), None)
