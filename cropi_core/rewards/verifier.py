r"""Grade completions against answers, each once, isolated from this process.

    with open_verifier(Grading()) as verifier:
        verifier.grade("math", r"The answer is \boxed{18}", "18")      # Grade(reward=1.0, reason="")

"Not gradable" differs from "wrong". A verifier that raises, hangs, crashes or exceeds its memory limit gives no
information about the completion: that item's reward is None with a reason, never 0.0, and no other item is affected.
The built-in verifiers and the user's functions run in two processes that can be killed, without network and writable
files (:mod:`cropi_core.rewards.process`). Servers are called over HTTP (:mod:`cropi_core.rewards.http`). Equal content
is graded once.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from cropi_core.errors import ConfigError
from cropi_core.rewards.cache import SHARED, GradeCache, content_key
from cropi_core.rewards.functions import source_digest
from cropi_core.rewards.http import HttpGrader
from cropi_core.rewards.process import IMPORTED, Grade, GradingProcess
from data_schemas import ALTERNATIVE, VERIFIERS, Grading, HttpVerifier

__all__ = ["MAX_COMPLETION", "VERIFIERS", "Grade", "Item", "Verifier", "open_verifier"]

MAX_COMPLETION = 65_536
"""Characters of a completion that a verifier receives, counted from its end, where answers are.

``exact`` receives all: the end of a text may equal an answer while the whole text does not.
"""


TRIED = 3
"""Prompts that each of the user's functions is tried on before anything is sampled."""


@dataclass(frozen=True)
class Item:
    """An item to grade.

    Attributes:
        verifier: Name of the verifier.
        completion: The text.
        answer: The dataset's answer, in the verifier's form.
        prompt: The messages, for verifiers over HTTP.
    """

    verifier: str
    completion: str
    answer: str
    prompt: Sequence[Mapping[str, Any]] = field(default=())


def open_verifier(grading: Grading) -> "Verifier":
    """Create the verifier for a configuration.

    Raises:
        ConfigError: See :class:`Verifier`.
    """
    return Verifier(
        timeout=grading.timeout_s,
        memory_mb=grading.memory_mb,
        functions=grading.functions,
        http=grading.http,
        sums=grading.sums,
    )


def best_grade(grades: Sequence[Grade]) -> Grade:
    """Choose the grade of a completion that is compared with several right answers.

    The best reward counts. If it is below 1 and another grade is not gradable, that one might have been better, so the
    result is not gradable.
    """
    best = max(
        (one for one in grades if one.reward is not None), key=lambda one: one.reward or 0.0, default=None
    )
    unknown = next((one for one in grades if one.reward is None), None)
    if best is not None and (unknown is None or (best.reward or 0.0) >= 1.0):
        return best
    return unknown or Grade(None, "there is no answer to compare with")


def weighted_sum(weights: Mapping[str, float], grades: Mapping[str, Grade]) -> Grade:
    """Add up the rewards of several verifiers, each times its weight.

    A sum is not gradable if one of its terms with a weight other than 0 is not: without it, the sum would mean
    something else. A term with the weight 0 is kept and does not count.
    """
    terms = {name: grades[name].reward for name in sorted(weights)}
    missing = [name for name, reward in terms.items() if reward is None and weights[name]]
    if missing:
        return Grade(None, f"{missing[0]}: {grades[missing[0]].reason}", terms)
    return Grade(math.fsum(weights[name] * (reward or 0.0) for name, reward in terms.items()), "", terms)


def _prompt(item: Item) -> bytes | None:
    """Identify the prompt of an item, whose completions share a budget of time; None if the item names none."""
    if not item.prompt:
        return None
    return content_key(item.verifier, None, "", item.answer, list(item.prompt))


class Verifier:
    """Grades items by verifier name. Thread-safe.

    Args:
        timeout: Time limit for an item in seconds.
        memory_mb: Address space of the worker in MiB (``RLIMIT_AS``; not enforced by macOS). ``math`` needs about 100,
            a function that imports torch several thousand.
        functions: The user's functions: name to ``package.module:function`` or ``path/to/file.py:function``, which
            takes ``(completion, answer)`` and returns a finite number. Imported immediately, and only in their worker.
        http: Grading servers, by name.
        sums: Weights by verifier of each weighted sum, by its name.
        cache: Cached rewards; by default shared by the whole process.

    Raises:
        ConfigError: A limit is not positive, a function is not importable, not callable or has the name of a built-in
            verifier, or the variable of a secret is not set.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        functions: Mapping[str, str] | None = None,
        http: Mapping[str, HttpVerifier] | None = None,
        sums: Mapping[str, Mapping[str, float]] | None = None,
        cache: GradeCache = SHARED,
    ):
        if not 0 < timeout < float("inf") or memory_mb < 1:
            raise ConfigError(f"timeout={timeout} and memory_mb={memory_mb} must be positive")
        functions, http = functions or {}, http or {}
        if taken := sorted({*functions, *http} & set(VERIFIERS)):
            raise ConfigError(
                f"functions may not replace the built-in verifiers {', '.join(taken)}; rename them"
            )
        self.sums = sums or {}
        self.names = (*VERIFIERS, *functions, *http, *self.sums)
        sources = {name: (path, source_digest(path)) for name, path in functions.items()}
        self.identities: dict[str, Any] = {
            **sources,
            **{name: [one.url, one.version] for name, one in http.items()},
        }
        """Content that identifies a verifier, in addition to its name."""
        self.cache = cache
        self.repeated = 0
        """Number of items that were not graded because equal content had been graded."""
        self.http = {name: HttpGrader(name, one) for name, one in http.items()}
        self.process = GradingProcess(timeout, memory_mb, {})
        """The process of the built-in verifiers."""
        self.functions = GradingProcess(timeout, memory_mb, sources) if sources else None
        if self.functions:
            self.functions.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def grade(self, verifier: str, completion: str, answer: str) -> Grade:
        """Grade one completion; see :meth:`grade_many`."""
        return self.grade_many([Item(verifier, completion, answer)])[0]

    def grade_many(self, items: Sequence[Item | tuple[str, str, str]]) -> list[Grade]:
        """Grade items, equal ones once; the grades are in their order.

        Raises:
            ConfigError: Before any grading, see :meth:`check`; or the worker does not start.
            ServerError: A server graded none of its items.
        """
        given = [item if isinstance(item, Item) else Item(*item) for item in items]
        if any(ALTERNATIVE in item.answer for item in given):
            single = [replace(item, answer=a) for item in given for a in item.answer.split(ALTERNATIVE)]
            grades = iter(self.grade_many(single))
            return [best_grade([next(grades) for _ in item.answer.split(ALTERNATIVE)]) for item in given]
        if any(item.verifier in self.sums for item in given):
            terms = iter(self.grade_many([term for item in given for term in self.terms(item)]))
            return [self._sum(item, [next(terms) for _ in self.terms(item)]) for item in given]
        wanted = [self._shortened(item) for item in given]
        self.check({item.verifier for item in wanted})
        keys = [self._key(item) for item in wanted]
        graded = {key: Grade(reward, "") for key in set(keys) if (reward := self.cache.get(key)) is not None}
        missing = {key: item for key, item in zip(keys, wanted, strict=True) if key not in graded}
        self.repeated += len(wanted) - len(missing)
        for key, grade in self._graded(missing):
            graded[key] = grade
            if grade.reward is not None:
                self.cache.put(key, grade.reward)
        return [graded[key] for key in keys]

    def check(self, names: Iterable[str]) -> None:
        """Refuse verifiers that cannot grade, before anything is sampled.

        Raises:
            ConfigError: A name is unknown, or the package that a verifier needs is not installed.
        """
        names = {term for name in names for term in self.sums.get(name, (name,))}
        if unknown := sorted(names - set(self.names)):
            raise ConfigError(
                f"unknown verifier {', '.join(map(repr, unknown))}; choose from {', '.join(self.names)}, or name it in "
                "grading.functions, grading.http or grading.sums"
            )
        for name in sorted(names & set(IMPORTED)):
            module, package, extra = IMPORTED[name]
            if importlib.util.find_spec(module) is None:
                raise ConfigError(
                    f'the verifier "{name}" needs {package}, which is not installed: pip install "cropi[{extra}]"'
                )

    def try_functions(self, items: Iterable[Item]) -> None:
        """Grade a few items with each of the user's functions, before anything is sampled.

        Two completions are tried with each of the first answers: a right one in a box, and an empty one.

        Raises:
            ConfigError: A function gives none of them a reward.
        """
        process = self.functions
        if process is None:
            return
        chosen: dict[str, list[Item]] = {name: [] for name in process.functions}
        for item in (term for one in items for term in self.terms(one)):
            if len(chosen.get(item.verifier, range(TRIED))) < TRIED:
                chosen[item.verifier].append(item)
        for name, some in chosen.items():
            tried = [
                replace(one, completion=text) for one in some for text in (f"\\boxed{{{one.answer}}}", "")
            ]
            grades = process.grade_many([(one.verifier, one.completion, one.answer) for one in tried])
            if grades and all(grade.reward is None for grade in grades):
                raise ConfigError(
                    f"grading.functions.{name} gave no reward for any of {len(grades)} items: {grades[0].reason}. "
                    f"The first was completion {tried[0].completion[:60]!r} with answer {tried[0].answer[:60]!r}"
                )

    def terms(self, item: Item) -> list[Item]:
        """Return the items whose rewards a weighted sum adds up; an item of another verifier is its own term."""
        weights = self.sums.get(item.verifier)
        return [item] if weights is None else [replace(item, verifier=name) for name in sorted(weights)]

    def _sum(self, item: Item, grades: Sequence[Grade]) -> Grade:
        weights = self.sums.get(item.verifier)
        return (
            grades[0]
            if weights is None
            else weighted_sum(weights, dict(zip(sorted(weights), grades, strict=True)))
        )

    def close(self) -> None:
        """End the worker; a later call to grade starts a new one."""
        self.process.close()
        if self.functions:
            self.functions.close()

    def _shortened(self, item: Item) -> Item:
        if item.verifier == "exact" or len(item.completion) <= MAX_COMPLETION:
            return item
        return Item(item.verifier, item.completion[-MAX_COMPLETION:], item.answer, item.prompt)

    def _key(self, item: Item) -> bytes:
        prompt = list(item.prompt) if item.verifier in self.http else []
        identity = self.identities.get(item.verifier)
        return content_key(item.verifier, identity, item.completion, item.answer, prompt)

    def _graded(self, items: Mapping[bytes, Item]) -> Iterable[tuple[bytes, Grade]]:
        """Grade items that are not cached, each with its verifier's backend."""
        built_in = {key: item for key, item in items.items() if item.verifier in VERIFIERS}
        users = {
            key: item for key, item in items.items() if key not in built_in and item.verifier not in self.http
        }
        for process, some in ((self.process, built_in), (self.functions, users)):
            if process and some:
                triples = [(item.verifier, item.completion, item.answer) for item in some.values()]
                prompts = [_prompt(item) or key for key, item in some.items()]
                yield from zip(some, process.grade_many(triples, prompts), strict=True)
        for name, grader in self.http.items():
            requests = {key: item for key, item in items.items() if item.verifier == name}
            bodies = [
                {"completion": one.completion, "answer": one.answer, "prompt": list(one.prompt)}
                for one in requests.values()
            ]
            if bodies:
                verdicts = grader.grade_many(bodies)
                yield from ((key, Grade(*verdict)) for key, verdict in zip(requests, verdicts, strict=True))
