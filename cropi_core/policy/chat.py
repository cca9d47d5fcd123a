"""The chat template of a run: chosen in the configuration, written into the policy's tokenizer files once.

    chosen = chat_settings(config.policy.chat)             # part of the policy's key
    write_chat(checkpoint, chosen)

Everything that renders a prompt afterwards finds it there, in any program: rollouts, training, evaluation, the policies
that are trained, and any program that loads one of those later. So are the template's arguments, as assignments
before its text: who renders need not know them.

Templates are untrusted. transformers renders them in Jinja's immutable sandbox; here they are put together and tried.
"""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cropi_core.errors import ConfigError, PolicyError, foreign_errors
from cropi_core.policy.checkpoint import read_settings
from cropi_core.policy.template_operators import WIDEST, limit_operators, unbounded_filters
from data_schemas import Chat

TEMPLATE_FILE = "chat_template.jinja"
MOST_LINES = 1_000_000
"""Lines of a template that a rendering may run through: some ten a message are usual."""
MOST_SECONDS = 10.0
"""CPU time of a rendering; a template takes less than a millisecond for a message."""
MOST_GROWTH = 1 << 30
"""Bytes by which the process may grow meanwhile."""
LARGEST = 1 << 20
"""Bytes of a template's file; the longest on the hub have some 20 kB."""

PLAIN = """{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- else %}{{ message.role | capitalize }}: {{ message.content }}
{%- endif %}{{ '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""For base models: turns by name, blank lines between them, and a name where the completion begins."""


def chat_settings(chat: Chat) -> dict[str, Any]:
    """Return what the section ``policy.chat`` says, a template's file by its text.

    Raises:
        ConfigError: The file is not there, too large, or no text.
    """
    template = chat.template
    if template == "plain":
        template = PLAIN
    elif template is not None and "{" not in template:
        path = Path(template).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"policy.chat.template={template!r} is not a file, `plain`, or the text of a template"
            )
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"policy.chat.template: {path} has more than {LARGEST >> 20} MB")
        with foreign_errors(f"policy.chat.template: {path} cannot be read as UTF-8", ConfigError):
            template = path.read_text(encoding="utf-8")
    return {"template": template, "arguments": chat.arguments}


def write_chat(checkpoint: Path, chosen: Mapping[str, Any]) -> None:
    """Write the template into a checkpoint's directory, and try it.

    Args:
        checkpoint: A copy of a checkpoint; files that are links are replaced, what they lead to stays as it is.
        chosen: What :func:`chat_settings` returned.

    Raises:
        PolicyError: There is no template to give arguments to, it reads no such argument, or it cannot render a
            user's message.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    template = chosen["template"] or tokenizer_template(tokenizer)
    if template is None:
        raise PolicyError(
            f"policy.chat.arguments={chosen['arguments']}: the checkpoint has no chat template that could read them; "
            "set policy.chat.template (`plain` is one for base models)"
        )
    if unread := [name for name in chosen["arguments"] if not re.search(rf"\b{re.escape(name)}\b", template)]:
        raise PolicyError(f"policy.chat.arguments: the chat template reads no {', '.join(unread)}")
    if chosen["template"] == PLAIN and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        template = "{{ bos_token }}" + template  # where the tokenizer itself would begin with it
    _replace(checkpoint, with_arguments(template, chosen["arguments"]))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    try_template(checkpoint, tokenizer)


def tokenizer_template(tokenizer: Any) -> str | None:
    """Return a tokenizer's template; of several, as some have for tools, the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def stored_template(checkpoint: Path) -> tuple[str | None, dict[str, Any]]:
    """Read a checkpoint's chat template, and the special tokens that it may name, without loading the tokenizer.

    A token that the files do not name is an empty text: the tokenizer's class may have a default, and only an undefined
    name would be an error of the template.
    """
    tokens: dict[str, Any] = dict.fromkeys(
        (f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), ""
    )
    template: Any = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := checkpoint / name).is_file():
            settings = read_settings(path)
            template = settings.get("chat_template", template)
            for token in tokens:
                value = settings.get(token)
                value = value.get("content") if isinstance(value, dict) else value
                tokens[token] = value if isinstance(value, str) else tokens[token]
    if isinstance(template, list):  # one for tools and a default one
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if (path := checkpoint / TEMPLATE_FILE).is_file():
        template = path.read_text(encoding="utf-8", errors="replace")
    return template if isinstance(template, str) else None, tokens


def check_messages(
    checkpoint: Path, chat: Mapping[str, Any] | None, prompts: Mapping[str, list[dict[str, str]]]
) -> None:
    """Render prompts by the template of a checkpoint, without its tokenizer and without torch.

    Args:
        checkpoint: Checkpoint directory.
        chat: What :func:`chat_settings` returned; None uses the checkpoint's template.
        prompts: Messages, by a name for error messages.

    Raises:
        PolicyError: The template refuses a prompt; names it and the remedy.
    """
    if not prompts:
        return
    template, tokens = stored_template(checkpoint)
    if chat is not None:
        template = with_arguments(chat["template"] or template or "", chat["arguments"])
    if not template:
        return
    check_template(template, str(checkpoint))
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, messages in prompts.items():
        roles = [message["role"] for message in messages]
        with refused_messages(roles, f"{name}: "), bounded_rendering():
            render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Put assignments before a template.

    transformers trims the line break behind a block, so the text after them begins a line, as it did before.
    """
    if not arguments:
        return template
    return "".join(f"{{% set {n} = {_literal(v)} %}}" for n, v in sorted(arguments.items())) + "\n" + template


def _literal(value: Any) -> str:
    """Write a JSON value as a Jinja literal: JSON, except for null."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _replace(checkpoint: Path, template: str) -> None:
    """Make ``template`` the one template of the tokenizer's files."""
    path, config = checkpoint / TEMPLATE_FILE, checkpoint / "tokenizer_config.json"
    path.unlink(missing_ok=True)
    path.write_text(template, encoding="utf-8")
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        config.unlink()
        config.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def check_template(template: str, where: str) -> None:
    """Refuse a template for what it could do with any message, before it is rendered.

    Products, powers and padding take memory or time in one operation, which nothing can interrupt. Products and powers
    are limited from now on where they are computed; padding must have a constant width.

    Raises:
        PolicyError: It is too long, is not a template, or pads to a width that is not constant.
    """
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension

    limit_operators()

    class Generation(Extension):
        """Reads the block ``generation``, by which transformers marks what an assistant says."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's name and type

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
                line
            )

    if len(template) > LARGEST:
        raise PolicyError(
            f"{where}: the chat template has {len(template):,} characters; at most {LARGEST:,} are read"
        )
    environment = Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols", Generation])
    with foreign_errors(f"{where}: the chat template cannot render anything", PolicyError):
        tree = environment.parse(template)
    for line, name in unbounded_filters(tree):
        raise PolicyError(
            f"{where}: line {line} of the chat template calls {name}, whose result can have any size. Write the text "
            f"out, or give a constant width up to {WIDEST:,}"
        )


@contextlib.contextmanager
def bounded_rendering(most: int = MOST_LINES) -> Iterator[None]:
    """Stop a template that loops or grows: its lines, their CPU time and the memory of the process are watched.

    Between two lines nothing is: a single operation of a template runs to its end. Other code is not traced.

    Raises:
        PolicyError: A template ran through more than ``most`` lines, or passed ``MOST_SECONDS`` or ``MOST_GROWTH``.
    """
    left, before, begun, size = most, sys.gettrace(), time.thread_time(), _peak()

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        spent, grown = time.thread_time() - begun, _peak() - size
        if left < 0 or spent > MOST_SECONDS or grown > MOST_GROWTH:
            raise PolicyError(
                f"the chat template was stopped after {most - left:,} lines, {spent:.1f} s and {grown / 1e6:.0f} MB; "
                "it may loop without end"
            )
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def try_template(checkpoint: Path, tokenizer: Any) -> None:
    """Render a user's message by a tokenizer's chat template.

    Args:
        checkpoint: Its directory, for messages.
        tokenizer: A tokenizer with a template.

    Raises:
        PolicyError: The template cannot render it, or leaves it out.
    """
    question = "What is 2 + 3?"
    if (template := tokenizer_template(tokenizer)) is not None:
        check_template(template, str(checkpoint))
    with refused_messages(["user"], f"{checkpoint}: "), bounded_rendering():
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    if question not in text:
        raise PolicyError(
            f"{checkpoint}: the chat template loses what a user says; it gives {text[:200]!r}. Set policy.chat.template"
        )


@contextlib.contextmanager
def refused_messages(roles: Sequence[str], where: str = "") -> Iterator[None]:
    """Turn the exceptions of a chat template, which raises any, into an error that says what to do.

    Args:
        roles: Roles of the messages that are rendered.
        where: Beginning of the message: the checkpoint, or the set and the prompt.

    Raises:
        PolicyError: The template raised something.
    """
    what = f"{where}the chat template cannot render messages of the roles {', '.join(roles)}"
    with foreign_errors(what, PolicyError, lambda error: _template_remedy(error, roles)):
        yield


def _template_remedy(error: Exception, roles: Sequence[str]) -> str:
    """Return what to do about an exception that a chat template raised."""
    from jinja2 import TemplateAssertionError, UndefinedError

    if isinstance(error, TemplateAssertionError):
        return "It was written for another program; set policy.chat.template"
    if isinstance(error, UndefinedError):
        return "Set what it needs in policy.chat.arguments, or set policy.chat.template"
    if "system" in roles:
        return (
            "Leave the system message out, put its text before the question (`system` and `template` of the set), "
            "or set policy.chat.template"
        )
    return "Set policy.chat.template to one that accepts them"
