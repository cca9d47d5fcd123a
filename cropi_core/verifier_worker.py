"""The process that grades, ``python -m cropi_core.verifier_worker``, driven by :mod:`cropi_core.verifiers`.

JSON lines both ways, one reply a request, in order:

    parent -> {"memory_mb": 1024, "alarm": 10.0, "math": true, "functions": {"name": "module:function"}}
    worker -> {"errors": {"name": "ModuleNotFoundError: ..."}}
    parent -> ["numeric", "The answer is 18.", "18"]
    worker -> [1.0, "", false]               reward or null, reason, whether this worker must be replaced

The worker ends when its stdin does. A verifier that hangs while the parent dies is ended by the kernel: by
the parent-death signal on Linux, by an interval timer everywhere. Both work while the interpreter is stuck
inside one long C call, where a watchdog thread would never run. Nothing here may import torch: a start costs
50 ms.
"""

import contextlib
import ctypes
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
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from types import FrameType
from typing import Any

PARENT_DIED = signal.SIGUSR2
"""Not SIGKILL: the kernel also sends it when only the *thread* that started the worker has ended, and the
parent must be able to tell that from a crash."""

STARTUP_SECONDS = 60.0
REASON_CHARACTERS = 200
PR_SET_PDEATHSIG = 1

VerifierFunction = Callable[[str, str], object]


class NotGradableError(ValueError):
    """The answer does not hold what the verifier compares with."""


def exact(completion: str, answer: str) -> float:
    """Compare the stripped strings."""
    return float(completion.strip() == answer.strip())


# A digit inside a word (m2, H2O) is no number; a minus after a digit, a word or a bracket (5-3) subtracts.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-+\u2212]))?(?:\\?\$(?P<inner>[-\u2212])?)?(?<!\w)"
    rf"(?P<top>{_DIGITS})(?:[eE](?P<exp>[-+]?\d{{1,3}})(?!\d))?(?:\s?/\s?(?P<bottom>{_DIGITS}))?"
)
_FRAC = re.compile(r"\\[dt]?frac\s*\{(-?[\d.,]+)\}\s*\{([\d.,]+)\}")
_MAX_DIGITS = (
    400  # int() refuses 4,300 digits with a ValueError, which would make a wrong number "not gradable"
)


def _value(match: re.Match[str]) -> Fraction | None:
    """Convert one match to a rational; None for a division by zero or a literal of absurd length."""
    top, bottom = match["top"].replace(",", ""), (match["bottom"] or "1").replace(",", "")
    if len(top) > _MAX_DIGITS or len(bottom) > _MAX_DIGITS or Fraction(bottom) == 0:
        return None
    value = Fraction(f"{top}e{match['exp'] or 0}") / Fraction(bottom)
    return -value if (match["sign"] or match["inner"]) in ("-", "\u2212") else value


def numeric(completion: str, answer: str) -> float:
    r"""Compare the completion's last number with the answer, as exact rationals.

    ``1,234``, ``$5``, ``-$5``, ``50%``, ``18.``, ``1e3``, ``3/4`` and ``\frac{3}{4}`` are numbers; the
    dollar and the per-cent sign are units without a factor: 50% equals 50. 0.5 equals 1/2, 0.333 is not 1/3.

    Raises:
        NotGradableError: When the answer (after a last ``####``, if there is one) is not one number.
    """
    gold_text = _FRAC.sub(r"\1/\2", answer.rsplit("####", 1)[-1]).strip().rstrip(".").rstrip(" %\\$")
    match = _NUMBER.fullmatch(gold_text)
    gold = _value(match) if match else None
    if gold is None:
        raise NotGradableError(f"the answer {answer[:60]!r} is not a number")
    found = deque(_NUMBER.finditer(_FRAC.sub(r" \1/\2", completion)), maxlen=1)
    return float(bool(found) and _value(found[0]) == gold)


_DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[", re.DOTALL)
_PLAIN = re.compile(r"[-+]?\\?\$?[\d,]{1,40}(?:\.\d{1,40})?\s*(?:\\?%)?")


_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def final_answer(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{}``, else the line after a last ``####``, else None."""
    opened: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and opened:
            box = opened.pop()
            if box[0] != "{" and (last is None or box.end() > last[0]):
                last = box.end(), brace.start()
        elif brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace)
    if last is not None:
        return text[slice(*last)].strip()
    _, mark, tail = text.rpartition("####")
    return (tail.strip().splitlines() or [""])[0] if mark else None


def _parse(text: str) -> list[Any]:
    """Parse with math-verify, whose own time limit would use the worker's SIGALRM and call a hang wrong."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # Without "no_fallback" the raw string is listed as if it were a parsed expression.
    return parse(text, targets, fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True)


@lru_cache(maxsize=1024)
def _gold(answer: str) -> list[Any]:
    """Parse the answer: boxed, in dollars, after ``####`` or bare; one prompt's completions share it."""
    boxed = final_answer(answer)
    # A bare `2(x+1)` read as prose gives 2; as a box it gives the expression.
    if boxed is None and not _DELIMITED.search(answer):
        boxed = answer.strip()
    return _parse(answer if boxed is None else f"\\boxed{{{boxed}}}")


@contextlib.contextmanager
def _memory_errors_surface() -> Iterator[None]:
    """Raise the MemoryError that sympy and math-verify swallow with ``except Exception`` and call False.

    A trace function is the only place that sees it. It doubles the time of an item (1.7 to 3.5 ms for an
    integer), so plain numbers, which cannot blow up, go without.
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
    """Compare as mathematics with math-verify; a completion that does not parse is wrong.

    Raises:
        NotGradableError: When the answer does not parse.
        MemoryError: When an expression outgrew the limit, even where the library hides it.
    """
    from math_verify import verify

    gold = _gold(answer)
    if not gold:
        raise NotGradableError(f"the answer {answer[:60]!r} does not parse as mathematics")
    claimed = final_answer(completion)
    text = completion if claimed is None else f"\\boxed{{{claimed}}}"
    plain = claimed is not None and _PLAIN.fullmatch(claimed)
    with contextlib.nullcontext() if plain else _memory_errors_surface():
        return float(verify(gold, _parse(text), timeout_seconds=0, raise_on_error=True))


def load(config: dict[str, Any]) -> tuple[dict[str, VerifierFunction], dict[str, str]]:
    """Import what the configuration asks for; return the verifiers by name and what went wrong by name."""
    verifiers: dict[str, VerifierFunction] = {"exact": exact, "numeric": numeric}
    errors: dict[str, str] = {}
    if config["math"]:
        try:
            logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
            math_equal(
                "\\boxed{\\frac{1}{2}}", "0.5"
            )  # builds grammar and regexes: 1 s that no item should pay
            verifiers["math"] = math_equal
        except Exception as error:
            errors["math"] = _describe(error)
    for name, path in config["functions"].items():
        module, _, attribute = path.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            if not callable(function):
                raise TypeError(f"{path} is a {type(function).__name__}, not callable")
            verifiers[name] = function
        except Exception as error:
            errors[name] = _describe(error)
    return verifiers, errors


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text[:REASON_CHARACTERS].split())


def grade(function: VerifierFunction, completion: str, answer: str) -> tuple[float | None, str, bool]:
    """Run one verifier; anything but a finite number is no grade. The third value asks for a new worker."""
    try:
        value = function(completion, answer)
        if not isinstance(value, numbers.Real):
            return None, f"returned {type(value).__name__}, not a number", False
        reward = float(value)
        return (
            (reward, "", False) if math.isfinite(reward) else (None, f"returned {reward}, not finite", False)
        )
    except NotGradableError as error:
        return None, str(error), False
    except MemoryError:
        return None, "MemoryError", True
    except BaseException as error:  # sys.exit() in a verifier is the item's failure, too
        return None, _describe(error), False


def main() -> None:
    """Serve requests until stdin ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_DIED)
    for name in (PARENT_DIED, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)  # an ignored signal would be inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    # What a verifier prints or reads must not touch the protocol: it gets stderr and an empty stdin.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    config = json.loads(requests.readline() or b"null")
    if config is None:
        return
    signal.setitimer(signal.ITIMER_REAL, STARTUP_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = config["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    verifiers, errors = load(config)
    os.write(replies, json.dumps({"errors": errors}).encode() + b"\n")
    for line in requests:
        name, completion, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, config["alarm"])
        reply = grade(verifiers[name], completion, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
