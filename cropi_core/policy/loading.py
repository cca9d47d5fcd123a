"""Policies: how checkpoints are copied, loaded, prompted and saved.

A policy is a Hugging Face checkpoint directory. Checkpoints are untrusted: weights are read from safetensors only,
remote code is never run, symbolic links and pickles are left behind.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers.utils.logging as transformers_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cropi_core.errors import PolicyError, foreign_errors
from cropi_core.policy.chat import (
    bounded_rendering,
    check_template,
    refused_messages,
    tokenizer_template,
    try_template,
    write_chat,
)
from cropi_core.policy.checkpoint import checkpoint_files, weight_count
from cropi_core.policy.checks import (
    check_finite,
    check_loaded,
    check_shapes,
    check_stored,
    check_tokenizer,
    check_types,
    unknown_token,
)

TRIAL = "2 + x₁² …\n\n" + 40 * "a" + "!"
"""A text on which a tokenizer is tried when a checkpoint is taken in."""
MOST_PACKED = 16
"""Parameters that a stored value may stand for: quantised weights are packed, tied ones are stored once."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def copy_checkpoint(source: Path, target: Path, chat: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check a checkpoint and copy its files; return the summary of the model (type, parameters).

    Args:
        source: The checkpoint.
        target: Directory to fill.
        chat: Chat template and arguments that the copy is given; see :mod:`cropi_core.policy.chat`.

    Raises:
        PolicyError: See :func:`checkpoint_files`; or weights are not finite; or transformers cannot build the model
            from it; or its tokenizer has tokens that the model lacks; or the chat template does not work.
    """
    files = checkpoint_files(source)
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, target / path.name)
    stored = weight_count(source)  # headers and lengths: a truncated file is reported now, not after hours
    check_types(source)
    check_stored(source)
    with foreign_errors(f"{source} cannot be used as a causal language model", PolicyError):
        config = AutoConfig.from_pretrained(target, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with foreign_errors(f"{source}: its tokenizer cannot be used", PolicyError), panic_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False, local_files_only=True)
        tokenizer(TRIAL)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PACKED * stored:
        raise PolicyError(
            f"{source}: config.json describes {parameters:,} parameters, the weights hold {stored:,} values; the rest "
            "would be made up"
        )
    check_shapes(source, model.state_dict())
    size = embedded_tokens(model)
    check_tokenizer(tokenizer, size, source)
    if chat is not None:
        write_chat(target, chat)
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False, local_files_only=True)
    elif tokenizer_template(tokenizer):
        try_template(source, tokenizer)
    _check_written(tokenizer, size, source)
    return {"model_type": config.model_type, "parameters": parameters}


def _check_written(tokenizer: Any, size: int, where: object) -> None:
    """Refuse a chat template that writes tokens without an embedding, on a prompt of one user's message."""
    token = unknown_token(render(tokenizer, [{"role": "user", "content": "a"}]), size)
    if token is not None:
        raise PolicyError(
            f"{where}: the chat template writes {tokenizer.convert_ids_to_tokens(token)!r}, token {token}, and the "
            f"policy embeds {size}: it was trained without it. Set policy.chat.template (`plain`, for base models)"
        )


@contextlib.contextmanager
def panic_errors(what: object) -> Iterator[None]:
    """Convert a panic of the tokenizer's library to a PolicyError.

    A pattern that backtracks without end is stopped by the regular expressions' own limit, and the library panics:
    ``pyo3_runtime.PanicException`` is a ``BaseException``, which no ``except Exception`` sees.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PolicyError(
            f"{what}: the tokenizer failed on a text ({str(error)[:200]}); it cannot be used"
        ) from error


def pick_device(device: str) -> torch.device:
    """Return the device that ``runtime.device`` names; ``auto`` is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise PolicyError(f"runtime.device={device!r} is not a device: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise PolicyError(
            f"runtime.device={device!r}, but this machine has no CUDA device; use `auto` or `cpu`"
        )
    return chosen


def load_policy(
    directory: Path, dtype: str, device: str, attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a checkpoint for inference or training: evaluation mode, left-padding tokenizer, pad token set.

    Args:
        directory: Checkpoint directory.
        dtype: ``float32`` or ``bfloat16``.
        device: See :func:`pick_device`.
        attention: Attention implementation of transformers; ``eager`` in any case where attention has a soft cap.

    Raises:
        PolicyError: The weights do not fill the model or are not finite; or the tokenizer has no end-of-sequence
            token or belongs to another model.
    """
    checkpoint_files(directory)
    check_types(directory)
    transformers_logging.disable_progress_bar()  # a bar per load drowns the run's own progress
    options = {"trust_remote_code": False, "local_files_only": True}
    with foreign_errors(f"{directory} cannot be loaded", PolicyError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if _soft_cap(directory) else attention,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    with foreign_errors(f"{directory}: its tokenizer cannot be used", PolicyError), panic_errors(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", **options)
    model, info = loaded
    check_loaded(directory, info)
    check_finite(model.named_parameters(), directory)
    if template := tokenizer_template(tokenizer):
        check_template(template, str(directory))
    check_tokenizer(tokenizer, size := embedded_tokens(model), directory)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token  # never read: padding is masked everywhere by lengths
    _end_turns(model, tokenizer)
    return model.to(pick_device(device)).eval(), tokenizer


def _soft_cap(directory: Path) -> bool:
    """Return whether attention has a soft cap (Gemma 2), which transformers has in its eager implementation alone."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    return bool(text.get("attn_logit_softcapping"))


def embedded_tokens(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model embeds."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, opened: bool = True
) -> list[int]:
    """Convert messages to the prompt's token ids; every step uses this function.

    With a chat template: the template, ending where the assistant begins. Without: the contents joined by blank
    lines and the tokenizer's special tokens, for base models.

    Args:
        tokenizer: The policy's.
        messages: The messages.
        opened: End where the assistant begins; otherwise after the last message. Only with a chat template.

    Raises:
        PolicyError: The template refuses the messages, or does not end; or the tokenizer fails on them.
    """
    with panic_errors("a prompt"):
        if tokenizer.chat_template:
            with refused_messages([m["role"] for m in messages]), bounded_rendering():
                encoded: Any = tokenizer.apply_chat_template(
                    [{"role": m["role"], "content": m["content"]} for m in messages],
                    add_generation_prompt=opened,
                    tokenize=True,
                    return_dict=True,
                )
        else:
            encoded = tokenizer("\n\n".join(m["content"] for m in messages))
    return [int(i) for i in encoded["input_ids"]]


def pad_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the padding token's id, which :func:`load_policy` has set."""
    token: Any = tokenizer.pad_token_id
    return int(token)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return every token id that ends a completion: the generation configuration's, and the tokenizer's.

    :func:`load_policy` has added the token that ends a turn of the chat template.
    """
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids: list[Any] = declared if isinstance(declared, list) else [declared]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def _end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Add the token that ends a turn to the generation configuration, which every sampler and trainer reads.

    Base models with a chat template, such as Qwen2.5, declare the end of a document only; their completions would run
    on into a turn of the user.

    Raises:
        PolicyError: The generation configuration declares end tokens that are not ids.
    """
    configuration: Any = model.generation_config
    if configuration is None:
        return
    with foreign_errors(
        f"{model.name_or_path}: eos_token_id={configuration.eos_token_id!r} in generation_config.json is not a "
        "token id or a list of them",
        PolicyError,
        "Correct it",
    ):
        ends, end = end_tokens(model, tokenizer), turn_end(tokenizer)
    if end not in ends:
        configuration.eos_token_id = [*ends, end]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token that the chat template puts at the end of the assistant's turn.

    For Gemma and Qwen's base models it is not the tokenizer's end of sequence, which stands at the end of a document.
    Without a template, or where the template ends a turn with no special token, it is.
    """
    default: Any = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return int(default)
    answer = "zyx"
    try:
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], tokenize=False
        )
    except (
        Exception
    ):  # a template raises what it likes, and one for prompts alone need not know the assistant
        return int(default)
    tail = text.rpartition(answer)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids: Any = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return int(next((i for i in ids if i in special), default))
