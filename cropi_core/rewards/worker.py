"""The grading process, ``python -m cropi_core.rewards.worker``, driven by :mod:`cropi_core.rewards.verifier`.

JSON lines in both directions, one reply per request, in order:

    parent -> {"memory_mb": 1024, "alarm": 10.0, "imported": [], "functions": {"name": ["file.py:grade", "sha256"]},
               "limits": {"network": false, "files": false, "writable": []}}
    worker -> {"errors": {"name": "ModuleNotFoundError: ..."}, "confinement": "no network, ..."}
    parent -> ["numeric", "The answer is 18.", "18"]
    worker -> [1.0, "", false, 0.0, 1]   reward or null, reason, whether this worker must be replaced, seconds if many,
                                         number of the request; a verifier that writes replies does not shift the others

The worker ends when its stdin closes. A verifier that hangs while the parent dies is ended by the kernel: by the
parent-death signal on Linux, by an interval timer everywhere. Both work while the interpreter is stuck inside one long
C call, where a watchdog thread would never run. This module must not import torch: a start costs 50 ms.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import logging
import math
import numbers
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from cropi_core.rewards.claims import answer_part, final_answer, stated, without_denials
from cropi_core.rewards.containers import split_list
from cropi_core.rewards.costs import MAX_CHARACTERS, may_exceed_memory, too_costly
from cropi_core.rewards.guardian import split
from cropi_core.rewards.mathematics import decide, for_parser, option
from cropi_core.rewards.notation import ascii_mathematics
from cropi_core.rewards.number_words import word
from cropi_core.rewards.quantities import bounded, quantity, same_quantity, sentence_quantity
from cropi_core.rewards.signatures import adapted, plain_number
from cropi_core.rewards.text_answers import (
    NotGradableError,
    choice,
    exact,
    number_of,
    numeric,
    tail_match,
    uncertain_end,
)
from cropi_core.system import Channel, Limits, confine

PARENT_DIED = signal.SIGUSR2
"""Parent-death signal of the worker.

Not SIGKILL: the kernel also sends it when only the *thread* that started the worker has ended, and the parent must be
able to distinguish that from a crash.
"""

STARTUP_SECONDS = 60.0
REASON_CHARACTERS = 200
PR_SET_PDEATHSIG = 1
REFUSED = "[Errno 13]"
HINT = " (functions may lack network and files: CROPI_FUNCTIONS_MAY in docs/guides/security.md)"
SLOW = 0.05
"""Seconds from which on the time of an item is reported; a budget of seconds needs no finer figure."""

SUFFIX = ".py"
"""Suffix that distinguishes a function's file from a module."""

LARGEST_FILE = 1 << 30
"""Maximum number of bytes that a verifier may write into one file."""

LARGEST = 1e6
"""A larger reward is treated as an error; rewards are stored as float32 and squared."""

VerifierFunction = Callable[[str, str], object]


PROSE = 4000
"""Characters of a text without a claim that math-verify searches, from its end."""


@lru_cache(maxsize=1024)
def _parsed(text: str) -> list[Any]:
    """Parse with math-verify, without its time limit, which uses the worker's SIGALRM and grades a hang as wrong."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # Without "no_fallback" the raw string would be listed as a parsed expression.
    return parse(text, targets, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)


def _gold_text(answer: str) -> str:
    """Extract the answer from its markup: boxed, after ``####``, in dollars or bare."""
    claimed = final_answer(answer)
    if claimed is not None:
        return claimed
    inside = re.findall(r"\$([^$]+)\$", answer)
    prose = re.sub(r"\$[^$]+\$", "", answer)
    return (
        inside[-1]
        if len(inside) == 1 and re.search(r"[A-Za-z]{2,}", prose) and quantity(answer) is None
        else answer.strip()
    )


@contextlib.contextmanager
def _memory_errors_surface() -> Iterator[None]:
    """Raise the MemoryError that sympy and math-verify catch with ``except Exception`` and report as False.

    A trace function is the only place that sees it. It multiplies the time of an item by two to three, so it is used
    only for texts that may need much memory.
    """
    seen = False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        frame.f_trace_lines = False
        if event == "exception" and arg[0] is MemoryError:
            seen = True
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
    if seen:
        raise MemoryError


def math_equal(completion: str, answer: str) -> float:
    """Compare as mathematics: exactly if no algebra is needed, otherwise with math-verify.

    Raises:
        NotGradableError: The answer does not parse, or an expression is too costly.
        MemoryError: An expression exceeded the limit, even if the library hides it.
    """
    gold = _gold_text(answer)
    bare = ascii_mathematics(gold).replace("\\{", "").replace("\\}", "")
    if not re.search(r"\w", bare) or bare.count("{") != bare.count("}"):
        raise NotGradableError(f"the answer {answer[:60]!r} does not parse as mathematics")
    claim = final_answer(completion)
    if claim is None:
        return _prose_equal(answer_part(completion)[0], gold)
    if claim.strip() == "" and gold:
        _gradable(gold)
        return 0.0
    return float(_claim_equal(claim, gold))


def _gradable(gold: str) -> None:
    """Raise an error if the answer is neither a number nor words and does not parse."""
    if quantity(gold) is not None or word(gold) is not None:
        return
    readable = re.search(r"[\dA-Za-z]", gold) and gold.count("{") == gold.count("}")
    if (
        not readable
        and not _parsed(f"\\boxed{{{for_parser(gold, gold)[1]}}}")
        and not _parsed(f"\\boxed{{{gold}}}")
    ):
        raise NotGradableError(f"the answer {gold[:60]!r} does not parse as mathematics")


def _claim_equal(claim: str, gold: str) -> bool:
    """Compare a text's claim with the answer; an answer such as "(A) 12" is matched by its letter or its text."""
    given, wanted = option(claim), option(gold)
    if given and wanted:
        return given[0] == wanted[0]
    if wanted:
        return any(_claim_equal(claim, part) for part in wanted)
    if given:
        letter = re.fullmatch(r"\(?([A-Za-z])\)?", word(gold) or gold.strip(" $"))
        return given[0].lower() == letter[1].lower() if letter else _claim_equal(given[1], gold)
    verdict = decide(claim, gold)
    if verdict is not None:
        return verdict
    number, claimed = quantity(gold), sentence_quantity(claim)
    if number and claimed:
        return same_quantity(claimed, number)
    if too_costly(claim) or too_costly(gold):
        raise NotGradableError(
            "an expression is too costly: a tower of powers, a huge factorial or a very long text"
        )
    left, right = for_parser(claim, gold)
    with _memory_errors_surface() if may_exceed_memory(left + right) else contextlib.nullcontext():
        golds = _parsed(f"\\boxed{{{right}}}") or _parsed(f"\\boxed{{{gold}}}")
        if not golds:
            _gradable(gold)
            return False
        if _undefined(golds):
            raise NotGradableError(f"the answer {gold[:60]!r} is undefined")
        return _verified(golds, _parsed(f"\\boxed{{{left}}}"))


def _undefined(parsed: list[Any]) -> bool:
    from sympy import nan, zoo

    return any(getattr(one, "has", None) is not None and one.has(nan, zoo) for one in parsed)


def _verified(golds: list[Any], claims: list[Any]) -> bool:
    """Compare with math-verify, and reject equality caused by the difference of two tiny numbers rounding to zero."""
    from math_verify import verify

    if not verify(golds, claims, timeout_seconds=0, raise_on_error=True):
        return False
    left, right = claims[0], golds[0]
    if not (getattr(left, "is_number", False) and getattr(right, "is_number", False)):
        return True
    try:
        left, right = left.doit(), right.doit()
        if left.is_zero or right.is_zero:
            return bool(left.is_zero and right.is_zero)
        if left == right or "1/100" in f"{golds[0]}{claims[0]}":
            return True
        return abs(complex((left / right).evalf(30)) - 1) <= 1e-5
    except (TypeError, ValueError, OverflowError, AttributeError):
        return bool(left == right)


_PLAIN_COMMAND = re.compile(
    r"\\(?:[$%()\[\],;:! ]|times\b|cdot\b|text\b|mathrm\b|quad\b|[dt]?frac\s*\{\d+\}\s*\{\d+\})"
)
_OPERATION = re.compile(r"\s*(?:[-+*/^!=<>\\_(\[{]|[a-z]\b)")


def _plain_last_number(text: str) -> Fraction | None:
    """Return the last number of a text whose end needs no mathematics, so that no algebra is loaded for it."""
    text, match = tail_match(text[-PROSE:])
    if "\\" in _PLAIN_COMMAND.sub("", text[-300:]):
        return None
    if (
        match is None
        or _OPERATION.match(text, match.end())
        or re.search(r"[-+*/^(!]\s*\Z", text[: match.start()])
    ):
        return None
    return number_of(match)


def _prose_equal(text: str, gold: str) -> float:
    """Compare the last statement of a text without a box, or else the expressions that math-verify finds in it."""
    exact = quantity(gold)
    statement = stated(text)
    if statement is not None:
        if exact and bounded(statement):
            return 0.0
        statement = re.sub(
            r",?\s+(?:and\s+)?not\s.*|\s+\((?:or|about|approx\w*|rounded)\s[^()]*\)\Z", "", statement
        )
        _, equals, right_side = statement.rpartition("=")
        statement = right_side if equals and quantity(right_side) else statement
        plain = all(quantity(part) for part in split_list(statement))
        if (verdict := decide(statement, gold)) is not None and (verdict or plain):
            return float(verdict)
    stripped = text.strip()
    if (
        len(stripped) <= 200
        and (verdict := decide(stripped, gold)) is not None
        and (verdict or quantity(stripped) is not None)
    ):
        return float(verdict)
    _gradable(gold)
    text = without_denials(text)
    if exact and uncertain_end(text):
        return 0.0
    if exact and not exact.percent and (last := _plain_last_number(text)) is not None:
        return float(last == exact.value)
    text = ascii_mathematics(text[-PROSE:])
    if too_costly(text[-MAX_CHARACTERS:]):
        raise NotGradableError(
            "an expression is too costly: a tower of powers, a huge factorial or a very long text"
        )
    with _memory_errors_surface() if may_exceed_memory(text + gold) else contextlib.nullcontext():
        golds = _parsed(f"\\boxed{{{for_parser(gold, gold)[1]}}}") or _parsed(f"\\boxed{{{gold}}}")
        claims = _parsed(text)
        if (
            exact is not None
            and len(claims) == 1
            and getattr(claims[0], "is_Rational", False)
            and not exact.percent
        ):
            return float(Fraction(int(claims[0].p), int(claims[0].q)) == exact.value)
        return float(_verified(golds, claims))


def load(config: dict[str, Any]) -> tuple[dict[str, VerifierFunction], dict[str, str]]:
    """Import the configured packages and functions; return the verifiers by name and the errors by name."""
    verifiers: dict[str, VerifierFunction] = {"exact": exact, "numeric": numeric, "choice": choice}
    errors: dict[str, str] = {}
    if "reasoning_gym" in config["imported"]:
        try:
            from cropi_core.rewards import reasoning_gym as gym_scorer

            gym_scorer.harden()
            verifiers["reasoning_gym"] = gym_scorer.score
        except Exception as error:
            errors["reasoning_gym"] = _describe(error)
    if "math" in config["imported"]:
        try:
            logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
            math_equal("\\boxed{2x+2}", "2(x+1)")  # builds grammar and regexes: 1 s that no item should pay
            verifiers["math"] = math_equal
        except Exception as error:
            errors["math"] = _describe(error)
    for name, (path, sha256) in config["functions"].items():
        try:
            verifiers[name] = load_function(path, sha256)
        except BaseException as error:  # a module can raise anything on import
            errors[name] = _describe(error)
    return verifiers, errors


def load_function(path: str, sha256: str) -> VerifierFunction:
    """Import a user's function.

    Args:
        path: Path as in the configuration.
        sha256: Digest from :func:`cropi_core.rewards.functions.source_digest`.

    Raises:
        RuntimeError: Its file has changed.
        AttributeError: The file has no such function.
        TypeError: It is not callable, or its signature is not one of :mod:`cropi_core.rewards.signatures`.
    """
    place, _, name = path.rpartition(":")
    module = (
        _run_file(Path(place).expanduser(), sha256) if place.endswith(SUFFIX) else _imported(place, sha256)
    )
    if not hasattr(module, name):
        raise AttributeError(f"{place} has no {name!r}")
    function: Any = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, not callable")
    return adapted(function)


def _imported(name: str, sha256: str) -> ModuleType:
    module = importlib.import_module(name)
    _check_unchanged(Path(module.__file__ or name).read_bytes(), sha256)
    return module


def _run_file(file: Path, sha256: str) -> ModuleType:
    """Execute exactly the bytes that were hashed; an import could use a compiled file of the same second and size."""
    source = file.read_bytes()
    _check_unchanged(source, sha256)
    name = f"cropi_function_{sha256[:16]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module  # dataclasses look up their module
        try:
            exec(compile(source, str(file), "exec"), module.__dict__)  # noqa: S102 - the operator named it
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_unchanged(source: bytes, sha256: str) -> None:
    if hashlib.sha256(source).hexdigest() != sha256:
        raise RuntimeError("its file has changed since this step began; run the same command again")


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = " ".join(text[:REASON_CHARACTERS].split())
    return text + HINT if REFUSED in text else text


def checked_reward(value: object) -> tuple[float | None, str]:
    """Accept a finite number as a reward; otherwise return why it is not one.

    Numbers of Python, of NumPy and of :mod:`decimal`, and arrays and tensors without dimensions, are accepted.
    """
    value = plain_number(value)
    if not isinstance(value, numbers.Real):
        shape = getattr(value, "shape", None)
        shape_note = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
        return None, f"returned {type(value).__name__}{shape_note}, not a number"
    reward = float(value)
    if not math.isfinite(reward):
        return None, f"returned {reward}, not finite"
    if abs(reward) > LARGEST:
        return None, f"returned {reward:g}, beyond {LARGEST:g}"
    return reward, ""


def grade(function: VerifierFunction, completion: str, answer: str) -> tuple[float | None, str, bool]:
    """Run one verifier; a result that is not a finite number is not a grade. The third value requests a new worker."""
    try:
        return *checked_reward(function(completion, answer)), False
    except NotGradableError as error:
        return None, str(error), False
    except MemoryError:
        return None, "MemoryError", True
    except BaseException as error:  # sys.exit() in a verifier also fails only its item
        return None, _describe(error), False


def main() -> None:
    """Serve requests until stdin ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_DIED)
    for name in (PARENT_DIED, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)  # an ignored signal would be inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # Output and input of a verifier must not reach the messages: it gets stderr and an empty stdin.
    requests, replies = os.fdopen(os.dup(0), "rb"), Channel.of_stdout()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    config = json.loads(requests.readline() or b"null")
    if config is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if config["functions"]:
        split(PARENT_DIED)
    signal.setitimer(signal.ITIMER_REAL, STARTUP_SECONDS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it fails with EFBIG
    limit = config["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    confinement = confine(
        Limits(**config["limits"])
    )  # before any package or function of the user is imported
    verifiers, errors = load(config)
    replies.send({"errors": errors, "confinement": confinement})
    for number, line in enumerate(requests, 1):
        name, completion, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, config["alarm"])
        began = time.monotonic()
        verdict = grade(verifiers[name], completion, answer)
        spent = time.monotonic() - began
        reply = (*verdict, round(spent, 3) if spent > SLOW else 0, number)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.send(reply)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent has ended, and no process reads the replies
        os._exit(1)
