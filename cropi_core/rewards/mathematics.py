r"""Comparison of two mathematical answers without computer algebra, and conversion of the rest for math-verify.

:func:`decide` compares numbers, lists, residues, numerals of a base, times and words exactly; :func:`for_parser`
converts the rest to the LaTeX that math-verify reads.
"""

import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from math import isqrt

from cropi_core.rewards.comparisons import based, chains, names, numbers, residues, times, undefined, words
from cropi_core.rewards.containers import container, orientation, split_list, vector
from cropi_core.rewards.intervals import interval, ordinary_brackets
from cropi_core.rewards.notation import tidy
from cropi_core.rewards.quantities import MAX_DIGITS, quantity

_ASSIGNED = re.compile(r"(\\?[A-Za-z](?:\s*\([A-Za-z]\)|_\{?\w\}?|')?)\s*=\s*([^=<>]+)\Z")
_FLIPPED = re.compile(r"([^=<>]+?)\s*=\s*([A-Za-z])\Z")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_POINT = re.compile(r"[A-Z]'?\s*(\([^()]+,[^()]+\))\Z")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_ELLIPSIS = re.compile(r"(?:\.{3}|\\[lc]?dots)\s*\Z")
_SUM_OF_UNITS = re.compile(r"\d\s*\\text\s*\{[^{}]*[a-z]{2}[^{}]*\}\s*\d")
_RELATION = re.compile(r"\\(?:[lg](?:t|eq?(?:slant)?)|neq?)(?![a-z])|[<>]=?")


_ROOT_OF_NEGATIVE = re.compile(r"\\sqrt\s*\{\s*-\s*(\d+(?:\.\d+)?)\s*\}")


_FACTOR = re.compile(r"(?<!\\pm)(?<!\\mp)(?<!\\times)(?<!\\cdot)(?<=[\w})])\s*\Z")


def _imaginary(text: str) -> str:
    r"""Write the only root of a negative number with the imaginary unit: ``\sqrt{-4}`` as ``i\sqrt{4}``."""
    roots = list(_ROOT_OF_NEGATIVE.finditer(text))
    if len(roots) != 1:
        return text
    before, after = text[: roots[0].start()], text[roots[0].end() :]
    number = Fraction(roots[0][1][:MAX_DIGITS])
    root = Fraction(isqrt(number.numerator), isqrt(number.denominator))
    unit = "i" if number == 1 else f"i\\sqrt{{{roots[0][1]}}}"
    if root**2 == number != 1 and not _FACTOR.search(before):
        unit = f"{root}i" if root.denominator == 1 else f"\\frac{{{root.numerator}}}{{{root.denominator}}}i"
    space = " " if before[-1:].isalpha() else ""
    return f"{before}{space}{unit}{' ' if after[:1].isalpha() else ''}{after}"


@lru_cache(maxsize=1024)
def core(text: str) -> tuple[str, str]:
    r"""Return the assigned variable, if any, and the text without it: ``x = 5`` gives ``x`` and ``5``."""
    text = _imaginary(_PI.sub(r"\\pi ", ordinary_brackets(tidy(text))))
    text = re.sub(r"(?<=[\d}])\s*\\?(?:approx|simeq|cong)\s*[\d.,]+\Z", "", text)
    assigned = _ASSIGNED.match(text)
    if assigned and not split_list(text)[1:]:
        return re.sub(r"\s", "", assigned[1]), assigned[2].strip()
    flipped = _FLIPPED.match(text)
    if flipped and not split_list(text)[1:] and quantity(flipped[1]):
        return flipped[2], flipped[1].strip()
    point = _POINT.match(text)
    return "", point[1] if point else text


_OF_ONE_KIND = (numbers, residues, based, times, names, words, chains)


def decide(claim: str, gold: str) -> bool | None:
    """Return whether two answers are equal if no algebra is needed; otherwise None."""
    name, left = core(claim)
    other, right = core(gold)
    named = not name or not other or _same_name(name, other)
    if _SPACE.sub("", left) == _SPACE.sub("", right) and right and named:
        return None if undefined(right) else True
    if quantity(right) and (
        _SUM_OF_UNITS.search(left) or _RELATION.match(left) or (_ELLIPSIS.search(left) and not quantity(left))
    ):
        return False
    left, right = both_signs(left, right)
    for compare in (*_OF_ONE_KIND, _assignments, _lists):
        verdict = compare(left, right)
        if verdict is not None:
            return verdict and named
    return None


def _same_name(name: str, other: str) -> bool:
    """Compare the variables on the left of two answers; ``y`` is the usual name of a function's value."""
    function = re.compile(r"[A-Za-z]'?\([A-Za-z]\)\Z")
    return name == other or ("y" in (name, other) and bool(function.match(name) or function.match(other)))


_PLUS_MINUS = re.compile(r"\\pm(?![a-z])")


def both_signs(left: str, right: str) -> tuple[str, str]:
    r"""Write ``\pm`` on one side as two values, if the other side has none."""
    for side, other in ((left, right), (right, left)):
        if (
            len(_PLUS_MINUS.findall(side)) == 1
            and not _PLUS_MINUS.search(other)
            and "\\mp" not in side + other
        ):
            plus = re.sub(r"\A\s*\+\s*", "", _PLUS_MINUS.sub("+", side))
            two = f"{plus}, {_PLUS_MINUS.sub('-', side)}"
            return (two, other) if side is left else (other, two)
    return left, right


_OPTION = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?([A-Z])[).:]?\s*\}|\(([A-Z])\)|([A-Z])[.):](?=\s))[\s~.:)]*(?=[^\s\\=<>+*/^_-]|\\(?:frac|text|sqrt|pi|d?frac|\$)|-\d)(.+)\Z",
    re.DOTALL,
)


def option(text: str) -> tuple[str, str] | None:
    r"""Return letter and text of an option such as ``\textbf{(A) } 12`` or "(A) 12"; None for other texts."""
    match = _OPTION.match(tidy(text))
    return (match[1] or match[2] or match[3], match[4].strip()) if match else None


def _assigned(text: str) -> list[tuple[str, str]]:
    """Return names and values of a list of two or more assignments, otherwise an empty list."""
    parts = [_ASSIGNED.match(part) for part in split_list(text)]
    pairs = [(re.sub(r"\s", "", part[1]), part[2].strip()) for part in parts if part]
    return pairs if len(pairs) == len(parts) > 1 else []


def _assignments(left: str, right: str) -> bool | None:
    r"""Compare lists of assignments: by name with each other, in order with a tuple; x = 1, x = 2 are two values."""
    claim, gold = _assigned(left), _assigned(right)
    if not claim and not gold:
        return None
    if _one_variable(claim) or _one_variable(gold):
        sides = [
            ", ".join(v for _, v in pairs) if _one_variable(pairs) else side
            for pairs, side in ((claim, left), (gold, right))
        ]
        return _lists(*sides) if (sides[0], sides[1]) != (left, right) else None
    if claim and gold:
        if sorted(n for n, _ in claim) != sorted(n for n, _ in gold) or len(dict(claim)) != len(claim):
            return None
        return _all(decide(dict(claim)[name], value) for name, value in gold)
    named, plain = (claim, right) if claim else (gold, left)
    kind, parts = container(plain)
    if len(dict(named)) != len(named) or kind not in ("", "()") or any("=" in part for part in parts):
        return None
    values = [value for _, value in (sorted(named) if kind else named)]
    if len(values) != len(parts):
        return False
    return _all(decide(a, b) for a, b in zip(*((values, parts) if claim else (parts, values)), strict=True))


def _one_variable(pairs: list[tuple[str, str]]) -> bool:
    """Return whether assignments give several values of one variable, as x = 1, x = 2 or x_1 = 1, x_2 = 2."""
    return bool(pairs) and len({re.sub(r"_\{?\w+\}?|'", "", name) for name, _ in pairs}) == 1


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts on parts."""
    results = list(verdicts)
    return False if False in results else None if None in results else True


def _lists(left: str, right: str) -> bool | None:
    """Compare lists element by element: in order within brackets, as a set without brackets or in braces."""
    kind, parts = container(left)
    other, wanted = container(right)
    if {orientation(left), orientation(right)} == {"row", "column"}:
        return False
    if len(parts) == 1 and len(wanted) == 1 and not kind and not other:
        return None
    ordered = {"", "{}"}.isdisjoint({kind, other})
    if ordered and kind != other and not ({kind, other} & {"()"} and ("matrix" in left + right)):
        simple = all(quantity(p) or "infty" in p for p in [*parts, *wanted])
        return False if simple and len(parts) == len(wanted) == 2 else None
    if not all(quantity(p) or container(p)[0] for p in [*parts, *wanted]):
        return _decided_in_order(parts, wanted) if ordered and len(parts) == len(wanted) else None
    if len(parts) != len(wanted):
        return kind == other == "{}" and _same_parts(parts, wanted)
    if ordered:
        return _decided_in_order(parts, wanted)
    if {kind, other} & {"()", "[]"}:
        return _decided_in_order(parts, wanted)
    return _same_parts(parts, wanted)


def _exact(text: str) -> object:
    number = quantity(text)
    return (number.value, number.percent) if number else tuple(map(_exact, container(text)[1]))


def _same_parts(parts: list[str], wanted: list[str]) -> bool:
    return set(map(_exact, parts)) == set(map(_exact, wanted)) and (
        len(parts) != len(wanted) or Counter(map(_exact, parts)) == Counter(map(_exact, wanted))
    )


def _decided_in_order(parts: list[str], wanted: list[str]) -> bool | None:
    if len(parts) != len(wanted):
        return False
    return _all(decide(a, b) for a, b in zip(parts, wanted, strict=True))


def _looks_like_interval(text: str) -> bool:
    return bool(re.search(r"\\infty|\\cup|\]\s*\Z|^\s*\[", text)) or container(text)[0] == "()"


def _union(text: str) -> str:
    """Write a list of intervals as their union; return an empty string for other texts."""
    parts = split_list(text)
    intervals = len(parts) > 1 and all(
        re.fullmatch(r"[(\[][^()\[\]]+,[^()\[\]]+[)\]]", part) for part in parts
    )
    return r" \cup ".join(parts) if intervals else ""


def for_parser(claim: str, gold: str) -> tuple[str, str]:
    """Convert two answers to the same notation, in the form that math-verify reads."""
    name, left = core(claim)
    other, right = core(gold)
    left, right = (re.sub(r"\A[A-Za-z]\s*\\in\s*", "", side) for side in (left, right))
    if re.search(r"\\mid|\\[lr]?vert|\|", left + right) and interval(left) and interval(right):
        left, right = interval(left) or left, interval(right) or right
    for side, opposite in ((left, right), (right, left)):
        as_interval = interval(side)
        if as_interval and _looks_like_interval(opposite) and not interval(opposite):
            left, right = (as_interval, opposite) if side is left else (opposite, as_interval)
        elif "\\cup" in opposite and (union := _union(side)):
            left, right = (union, opposite) if side is left else (opposite, union)
    if ("matrix" in left) != ("matrix" in right) or "\\langle" in left + right:
        left, right = (f"({','.join(v)})" if (v := vector(side)) else side for side in (left, right))
    if name and other and name != other:
        return f"{name}={left}", f"{other}={right}"
    if name and not other and "=" in right:
        left = f"{name}={left}"
    if other and not name and "=" in left:
        right = f"{other}={right}"
    left, right = both_signs(left, right)
    return _latex(left, right), _latex(right, left)


_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sinh|cosh|tanh|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp)(?=\s*[\d(\\^_{]|\s+[a-z]\b)"
)
_OF_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*\{?\d\}?)?)\s*\(?\s*(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*\)?"
)


def _latex(text: str, other: str) -> str:
    r"""Convert what math-verify misreads: "sin(x)", "sqrt(2)", degrees within ``\sin``, nested lists for matrices."""
    text = re.sub(r"(?<![a-zA-Z])\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)\s?x\s?(?=\d)", r" \\times ", text)
    text = re.sub(r"(?<=[\w)}])\s?\*\*\s?(-?\w+|\([^()]*\))", r"^{\1}", text)
    text = _OF_DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", _FUNCTION.sub(r"\\\1", text))
    if re.search(r"[a-z]", other):
        text = re.sub(r"(?<=\d)[a-z]{2,3}(?![a-z({])", lambda m: " ".join(["", *m[0]]), text)
    if "matrix" in other and re.fullmatch(r"\[\s*\[.*\]\s*\]", text):
        rows = re.findall(r"\[([^\[\]]*)\]", text)
        return "\\begin{pmatrix}" + r"\\".join(row.replace(",", "&") for row in rows) + "\\end{pmatrix}"
    return text
