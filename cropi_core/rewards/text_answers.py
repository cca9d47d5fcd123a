r"""Verifiers that compare text: ``exact``, ``numeric``, ``choice``.

A completion without an answer is wrong (0.0); an unusable answer in the dataset raises :class:`NotGradableError`. Runs
in the verifier's process, so this module may import only the standard library.
"""

import re
import unicodedata
from collections import deque
from fractions import Fraction

from cropi_core.rewards.claims import answer_part, final_answer, stated, without_denials
from cropi_core.rewards.notation import prose_numbers, tidy
from cropi_core.rewards.number_words import number_word
from cropi_core.rewards.quantities import MAX_DIGITS, bounded, quantity


class NotGradableError(ValueError):
    """The dataset's answer has no value that the verifier can compare."""


def exact(completion: str, answer: str) -> float:
    """Compare the stripped strings."""
    return float(completion.strip() == answer.strip())


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGN = r"(?:(?<![\w)])(?<![\d)]\s)(?P<sign>[-+]))?(?P<money>\\?[$£€¥₹]\s?(?P<inner>-)?)?"
_LATEX_FRACTION = (
    r"(?:(?P<whole>\d+)\s?)?\\[dtc]?frac\s*(?:\{\s*(?P<n>-?[\d.,]+)\s*\}|(?P<n1>\d))\s*"
    r"(?:\{\s*(?P<d>-?[\d.,]+)\s*\}|(?P<d1>\d))"
)
_TIMES = (
    r"(?:[eE](?P<exp>[-+]?\d{1,3})(?!\d)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<ten>[-+]?\d{1,3})\s*\}?(?!\d)"
    r"|(?:\^|\*\*)\s*\{?\s*(?P<power>-?\d{1,3})\s*\}?(?!\d))"
)
_SCALE = r"(?:\s(?P<scale>thousand|million|billion|trillion)\b|(?P<kilo>[kK])\b)"
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# A digit inside a word (m2, H2O), an exponent, an index or a coefficient (x^2, a_1, 5x) is not a number; a minus after
# a digit, a word or a bracket (5-3) subtracts.
_NUMBER = re.compile(
    rf"{_SIGN}(?:{_LATEX_FRACTION}|(?<![\w^])(?<![\^_]\{{)(?:(?P<mixed>\d+) (?P<mn>\d+)\s?/\s?(?P<md>\d+)(?![\d./])"
    rf"|(?P<top>{_DIGITS}){_TIMES}?(?:\s?/\s?(?P<bottom>{_DIGITS}))?{_SCALE}?))"
    r"(?!\d|[A-Za-fijkn-rt-z](?![A-Za-z]))",
)
_LIST = re.compile(
    r"[(\[{]?[^()\[\]{}]*\d[^()\[\]{}]*(?:(?:,(?!\d{3}(?!\d))|;)\s*|\b(?:or|and)\b)[^()\[\]{}]*\d[^()\[\]{}]*[)\]}]?\Z"
)
_BOUND_ALONE = re.compile(
    r"(?:between\s+\S+\s+and|from\s+\S+\s+to|(?:more|less|fewer|greater|larger|smaller)\s+than|at\s+(?:least|most))"
    r"\s+\$?\d[\d,.]*\W*(?:[A-Za-z]+\W*)?",
    re.IGNORECASE,
)
SHORT = 80
"""Characters of a text that can be a single number."""


def number_of(match: re.Match[str]) -> Fraction | None:
    """Convert one match to a rational; return None for a division by zero or an extremely long literal."""
    part = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    if any(len(text) > MAX_DIGITS for text in part.values()) or (part["kilo"] and not part["money"]):
        return None
    try:
        if part["top"]:
            value = Fraction(part["top"]) * Fraction(10) ** int(part["exp"] or part["ten"] or 0)
            value = value ** int(part["power"]) if part["power"] and value.denominator == 1 else value
            value /= Fraction(part["bottom"] or "1")
            value *= _SCALES.get(part["scale"], 1000 if part["kilo"] else 1)
        elif part["mixed"]:
            value = Fraction(part["mixed"]) + Fraction(part["mn"]) / Fraction(part["md"])
        else:
            value = Fraction(part["n"] or part["n1"]) / Fraction(part["d"] or part["d1"])
            value += Fraction(part["whole"] or "0")
    except (ValueError, ZeroDivisionError):
        return None
    return -value if "-" in (part["sign"], part["inner"]) else value


def last_match(text: str) -> re.Match[str] | None:
    """Find the last number of a text."""
    matches = deque(_NUMBER.finditer(text), maxlen=1)
    return matches[0] if matches else None


TAIL = 240
"""Characters at the end of a text that are searched first for its last number."""
_BEGINNING = 60
"""Characters of a tail in which a number may have lost its beginning."""


def tail_match(text: str) -> tuple[str, re.Match[str] | None]:
    """Find the last number of a text; return the part of the text that was searched, prepared, with it."""
    tail = prose_numbers(text[-TAIL:])
    match = last_match(tail)
    if len(text) <= TAIL or (match and match.start() > _BEGINNING):
        return tail, match
    text = prose_numbers(text)
    return text, last_match(text)


_UNCERTAIN = re.compile(
    r"(?:\bbetween\s+\S+\s+and|\d[\d.,]*\s+(?:\w+\s+)?or(?:\s+(?:maybe|perhaps|possibly|even))?(?:\s+[a-z]\s*=)?)\s+\$?\Z",
    re.IGNORECASE,
)


# 3-4, 3 + 4, 10:45 and 1.2.3 are no single number.
_PART_OF_MORE = re.compile(r"\d(?:[-:.]|\s?[+*×]\s?)\$?\Z")


def uncertain_end(text: str) -> bool:
    """Return whether a text ends with a range or one of two numbers: "between 3 and 5", "3 or maybe 5"."""
    tail, match = tail_match(text)
    return match is not None and bool(_UNCERTAIN.search(tail[: match.start()][-SHORT:]))


def _last_number(text: str) -> Fraction | None:
    tail, match = tail_match(text)
    if match is None or _PART_OF_MORE.search(tail[: match.start()]) or uncertain_end(text):
        return None
    return number_of(match)


_COUNTED = re.compile(r"((?:-|\\?[$£€¥₹]\s?)*\d[\d.,/]*%?)\s+\(?[A-Za-z][^=]*\Z")
_COMPUTED = re.compile(
    r"\b(?:is|are|was|equals?|gives?|makes?|times|plus|minus|divided|multiplied|more|less|fewer|than|and|or|to|which|so|"
    r"but|not|thousand|million|billion|trillion|hundred|dozen|percent|base|mod)\b|[+*/^]|\s-\s",
    re.IGNORECASE,
)


def _counted(claim: str) -> str:
    """Return the number that a claim begins with, if the rest only says of what: "7 apples on 12 trees"."""
    match = _COUNTED.match(claim)
    return match[1] if match and not _COMPUTED.search(claim, match.end(1)) else claim


_RESULT = re.compile(
    r",\s*(?:which\s+(?:is|makes|gives|equals)|so|or\s+simply|that\s+is)\s+(?=[^,]*\d)", re.IGNORECASE
)


def _claimed_number(claim: str) -> Fraction | None:
    """Return the number that a claim gives; a list, a range or a bound gives none."""
    claim = tidy(claim)
    claim = claim.rpartition("=")[2].strip() or claim
    claim = _RESULT.split(claim)[-1]
    claimed = quantity(claim)
    if claimed is not None:
        return claimed.value
    if (named := number_word(claim)) is not None:
        return named
    listed = _LIST.match(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", claim)) and len(claim) <= SHORT
    return None if listed or bounded(claim) else _last_number(_counted(claim))


_NO_NUMBER = re.compile(
    r"(?:\\text\s*\{)?\s*(?:none|no\s+(?:real\s+)?solutions?|undefined|unknown|does\s+not\s+exist|dne|n/a|infinit(?:y|e)|"
    r"(?:it\s+)?cannot\s+be\s+determined|not\s+enough\s+information)\s*\}?",
    re.IGNORECASE,
)
"""Claims that there is no number."""


def numeric(completion: str, answer: str) -> float:
    r"""Compare the number that a completion claims with the answer, as exact rationals.

    The claim is the last ``\boxed{}``, the line after the last ``####``, the last statement such as "the answer is 5",
    or else the last number of the text after the reasoning. ``1,234``, ``$5``, ``-$5``, ``50%``, ``18.``, ``1e3``,
    ``1.5\times 10^3``, ``3/4``, ``3 1/2``, ``-\frac{3}{4}`` and "five" are numbers; the dollar and the per-cent sign
    are units without a factor: 50% equals 50. 0.5 equals 1/2, 0.333 is not 1/3. "3 or 4", "(3, 4)" and "more than 3"
    are none.

    Raises:
        NotGradableError: The answer (after its last ``####``, if any) is not a single number.
    """
    final = final_answer(answer)
    expected = quantity(answer.rsplit("####", 1)[-1] if final is None or "####" in answer else final)
    if expected is None:
        raise NotGradableError(f"the answer {answer[:60]!r} is not a number")
    text = answer_part(completion)[0]
    claim = final_answer(completion)
    if claim is not None and (re.search(r"\d", claim) or number_word(claim) is not None):
        return float(_claimed_number(claim) == expected.value)
    if claim is not None and _NO_NUMBER.fullmatch(tidy(claim)):
        return 0.0
    statement = prose_numbers(stated(text) or "")
    if re.search(r"\d", statement) or number_word(statement) is not None:
        return float(_claimed_number(statement) == expected.value)
    text = text.strip()
    if len(text) <= SHORT:
        text = prose_numbers(text)
        if _BOUND_ALONE.fullmatch(text):
            return 0.0
        if (measured := quantity(text)) is not None or text[:1] + text[-1:] in ("()", "[]"):
            return float(measured is not None and measured.value == expected.value)
        if (named := number_word(text)) is not None:
            return float(named == expected.value)
    return float(_last_number(without_denials(text)) == expected.value)


# Adjacent repetitions are possessive, so that a text of a thousand stars is not matched in quadratic time.
_OPEN = r"(?:\\(?:text|textbf|mathrm|mathbf)\s*+\{|[\s*_`$\"'(\[{])*+"
_CLOSE = r"[\s*_`$\"')\]}.:,;]*+"
_WORD_CHARACTER = r"(?:_*[A-Za-z0-9]|'[A-Za-z]|_\{)"
# A lowercase letter counts only before a closing bracket or a line end: "the answer is a prime" names no choice.
_LETTER = rf"{_OPEN}(?:([A-Z])(?!{_WORD_CHARACTER})|([a-z])(?={_CLOSE}\Z|[)\]}}]|[.,;]?\n))"
_ONLY = re.compile(rf"{_OPEN}(?:(?i:option|choice|answer)\s*+:?\s*+)?{_LETTER}{_CLOSE}")
_WITH_TEXT = re.compile(rf"{_OPEN}([A-Z])[)\]}}.:]{{1,3}}\s+\S.*|{_OPEN}([A-Z])\s+[-:]\s+\S.*", re.DOTALL)
# "The answer is I don't know" and "the answer is A cat" name no choice.
_NOT_A_WORD = (
    r"(?!(?<=[AI])\s+(?!(?:or|and|because|since|as|for|which|not|with|rather|instead|but|due|where|that|is)\b)"
    r"[a-z])"
)
_STATED = re.compile(
    r"(?:\b(?i:answer|option|choice)[\s*_]*+(?:(?i:is|was|would\s+be|should\s+be|must\s+be)\b\s*+(?i:(?:clearly|therefore|thus|simply)\s)?[:=]?|[:=])"
    r"|\bI(?:\s+would|\s+will|'d|'ll)?\s+(?i:choose|chose|pick|picked|select|selected|go\s+with|went\s+with)\b"
    r"|(?:答案|选项|選項|选择|選擇|选|選|正解|정답)\s*+(?:是|为|為|は|은)?\s*+[:：]?"
    r"|\b(?i:respuesta|resposta|risposta|réponse|antwort|ответ)\b[^\n.:]{0,20}?(?:\b(?i:es|est|ist|lautet|è)|:)\s++(?:(?i:la|die|le)\s)?)"
    rf"[\s*_]*+(?i:(?:option|choice)\b)?{_LETTER}{_NOT_A_WORD}"
)
_CALLED_RIGHT = re.compile(
    r"(?:(?i:option|choice)\s+|(?<![A-Za-z0-9]))\(?([A-Z])\)?\s+(?i:is)\s+(?i:the\s+)?(?i:correct|right|true|best)\b"
)
_STOP = r"(?:(?!\b(?i:but|so|rather|instead|hence|therefore)\b|,\s*+it)[^.;\n])*"
_DENIED = re.compile(
    rf"\b(?i:answer|option|choice)[\s*_]*+(?i:is|was|can|could)(?i:\s*+(?:not|neither|never|none)\b|n't\b){_STOP}"
    rf"|\b(?i:neither)\b{_STOP}"
    r"|\b(?i:not|isn't|nor|except|can't\s+be|cannot\s+be|not\s+be|rule\s+out|eliminate)\s++(?i:(?:option|choice)\s++)?\(?[A-Z]\b\)?"
    r"|(?i:\b(?:not|never)|n't)\s+(?i:pick|choose|select|go\s+with)\s+(?i:(?:option|choice)\s+)?\(?[A-Z]\b\)?"
    r"|(?:不是|并非|不选|不選|不可能是)\s*+\(?[A-Z]\)?"
    r"|(?:\(?\b[A-Z]\b\)?\s?(?:,|and|or)\s?){0,4}\(?\b[A-Z]\b\)?\s(?:is|are)\s+(?:wrong|incorrect|false|not)\b"
)
_DENIES = (
    *(
        "n't",
        "not",
        "neither",
        "nor",
        "except",
        "rule",
        "eliminate",
        "wrong",
        "incorrect",
        "false",
        "never",
    ),
    *("none", "不"),
)
"""Words of which every denial has one; the pattern is slow."""
# Exclude the words in "A cat" and "I think".
_STANDALONE = re.compile(r"(?<![A-Za-z0-9_'\\])(?:[B-HJ]|[AI](?!\s+(?!(?:or|and)\b)[a-z]))(?![A-Za-z0-9_'])")
_ALSO = re.compile(
    r"[\s*_`$\"')\]}]*+(?:"
    rf"(?:,\s*+)?(?i:or|and)\b\s*+(?i:(?:option|choice)\b)?{_OPEN}[A-Z](?!{_WORD_CHARACTER})"
    r"(?!\s+(?i:is|are|was|were|does|would|can|cannot)\b)"
    rf"|[,/&]{_OPEN}[A-Z](?!{_WORD_CHARACTER})(?=[\s*_`$\"')\]}}]*+(?:\Z|[.,;:/&\n]|(?i:or|and)\b)))"
)
_GOLD = re.compile(_LETTER + rf"(?:{_CLOSE}|[)\]}}.:]+\s(.*))", re.DOTALL)


def choice(completion: str, answer: str) -> float:
    r"""Compare the letter that a completion chooses with the answer's.

    The choice is the content of the last ``\boxed{}`` or the text after the last ``####``; otherwise the last "answer
    is B", "Answer: (B)" or "option is **B**"; otherwise the last letter A to J that stands alone. A box may contain
    the option's text with its letter, or instead of it if the answer has the text. Two adjacent letters ("A or B",
    "(A), (C)"), and negated letters ("neither A nor B"), are not a choice.

    Raises:
        NotGradableError: The answer is not a letter: "B", "(b)", "B." or "B) with its text".

    References:
        The three levels after the box are those of MMLU-Pro (TIGER-Lab/MMLU-Pro, ``evaluate_from_api.py``). Unlike
        there, the last statement counts and not the first, and words and pairs are recognised.
    """
    gold = _GOLD.fullmatch((final_answer(answer) or answer).strip())
    if gold is None:
        raise NotGradableError(f"the answer {answer[:60]!r} is not a letter A to Z")
    text = (gold[3] or "").strip(" .").casefold()
    if text and _names_text(completion, text):
        return 1.0
    return float(chosen(completion) == _name(gold))


def _names_text(completion: str, text: str) -> bool:
    """Return whether a claim, a statement or a whole short text is the text of the right option."""
    part = answer_part(completion)[0]
    for claim in (final_answer(completion), stated(part), part if len(part) <= 2 * len(text) + 10 else None):
        if claim is not None:
            return tidy(claim).strip(" .").casefold() == text
    return False


def _prepared(text: str) -> str:
    """Normalise the characters and the spacing commands of a text."""
    return _SPACES.sub(" ", unicodedata.normalize("NFKC", text))


_SPACES = re.compile(r"\\[ ,;:!]|\\q?quad(?![a-z])|~")


def chosen(text: str) -> str | None:
    """Return the letter that a text chooses, or None if it chooses none or several."""
    claimed = final_answer(text)
    if claimed is not None:
        claimed = _prepared(claimed)
        box = _ONLY.fullmatch(claimed) or _WITH_TEXT.fullmatch(claimed)
        return _name(box) if box else _last_stated(claimed)[1]
    text = _prepared(answer_part(text)[0])
    match = _ONLY.fullmatch(text.strip())
    if match:
        return _name(match)
    lower = text.lower()
    if any(word in lower for word in _DENIES):
        text = _DENIED.sub(" ", text)
    has_statement, letter = _last_stated(text)
    if has_statement:
        return letter
    lines = [line for line in text.splitlines() if line.strip()]
    for line in (lines[-1:] + lines[:1]) if len(lines) > 1 else ():
        if (alone_in_line := _ONLY.fullmatch(line.strip())) is not None:
            return _name(alone_in_line)
    alone = deque(_STANDALONE.finditer(text), maxlen=2)
    if not alone:
        return None
    pair = _ALSO.match(text, alone[0].end()) if len(alone) == 2 else None
    return None if pair and pair.end() == alone[-1].end() else alone[-1][0]


def _last_stated(text: str) -> tuple[bool, str | None]:
    """Return whether a text states a choice, and its letter unless it states two."""
    last = deque(_STATED.finditer(text), maxlen=1) or deque(_CALLED_RIGHT.finditer(text), maxlen=1)
    if not last:
        return False, None
    return True, None if _ALSO.match(text, last[0].end()) else (
        last[0][1] or last[0][last[0].re.groups]
    ).upper()


def _name(match: re.Match[str]) -> str:
    return (match[1] or match[2]).upper()
