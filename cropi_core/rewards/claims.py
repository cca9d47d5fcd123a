r"""Location of a text's final answer: after the reasoning, in a tag, in a box, after ``####``, or in a statement.

Runs in the verifier's process, so this module may import only the standard library.
"""

import re
from collections import deque

from cropi_core.rewards.boxes import Box, closed_boxes, innermost_boxes

_THOUGHT = r"(?:think(?:ing)?|thought|reasoning|scratchpad)"
_END_OF_THOUGHT = re.compile(
    rf"(?:</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>)",
    re.IGNORECASE,
)
_START_OF_THOUGHT = re.compile(
    rf"(?:<{_THOUGHT}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis<\|message\|>)",
    re.IGNORECASE,
)
_TAG_NAME = r"(?:(?:final[_-]?)?answer|solution)"
_OPENED = re.compile(rf"<{_TAG_NAME}>|\[ANSWER\]", re.IGNORECASE)
_CLOSED = re.compile(rf"</{_TAG_NAME}>|\[/ANSWER\]", re.IGNORECASE)
_CONTROL = re.compile(
    r"<\|[\w ]{1,40}\|>|</?(?:s|eos|pad|answer|end_of_turn)>|\[/?(?:INST|EOS)\]", re.IGNORECASE
)
_LOST_BACKSLASH = re.compile(r"(?:\x08|(?<![\\A-Za-z\x08])b)oxed\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$.,;]*(?:,|;|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})[\s$]*")
_TOKEN = re.compile(r"\(([^()\n]{1,200})\)|(-?\d[\d.,/]*\d|\d|[A-Za-z])(?![\w{])|\\[dt]?frac.*")
_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_REASON = re.compile(r",?\s+(?:since|because)\b", re.IGNORECASE)
_FINAL_WORDS = re.compile(
    r"[\s*_:#]*(?:(?:the|my|so|thus|hence|therefore)\W+)*(?:(?:final|correct|right)\s+)*"
    r"(?:answer|result|solution)\b\s*(?:is|are|=)?[\s*_:]*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:\d{1,2}[.)]\s+[A-Za-z]|(?:step|part|case)\s+\d)", re.IGNORECASE)
_VERB = r"(?:is|are|was|would be|should be|must be|has to be|comes out to|equals)\b"
_ADVERB = r"(?:\s*+,?\s*+(?:therefore|thus|hence|then|simply|clearly|exactly|indeed|now)\b,?)?"
_FOREIGN = (
    r"(?:\b(?:respuesta|resposta|risposta|r[ée]ponse|antwort|lösung|ergebnis|ответ|результат)(?:\s+\w+){0,2}?[\s*_]*"
    r"(?:(?:\bes|\best|\bist|\blautet|\bè|\bé)\b[:=]?|[:=—–])(?:\s+(?:la|el|le|die)\b)?"
    r"|(?:答え|正解|解答|정답|답)[\s*_]*(?:は|은|는|:|：)?)"
)
_STATED = re.compile(
    rf"(?:\b(?:answer|result)(?:\s++to\s++(?:the|this)\s++(?:question|problem))?{_ADVERB}[\s*_]*+"
    rf"(?:{_VERB}{_ADVERB}[\s*_]*+[:=]?|[:=])"
    rf"|答案(?:是|为|為|应为|應為|等于)?[:：]?|{_FOREIGN})",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？](?=\s|\*|\Z)|[。！？]|;\s")
_NEGATED = re.compile(
    r"[\s*_]*(?:(?:not|neither|never|no longer|nor|isn't|nicht|kein|ne|pas|no es|не)\b|不|并非)",
    re.IGNORECASE,
)


_DENIAL = re.compile(
    r"\b(?:answer|result)\b[\s*_:]*+(?:(?:is|are|was)?[\s*_]*+(?:not|neither|never)\b|(?:is|are|was)n't\b)(?:(?!\bbut\b)[^\n.,])*"
    r"|\b(?:(?:is|are|was|were|it's|that's)\s+not|(?:is|are|was|were)n't)\s+[-+$\\]*\d(?:[\d.,/]*\d)?"
    r"|\((?:and\s+)?not\s[^()\n]*\)|,\s+(?:and\s+)?not\s+[-+$\\]*\d(?:[\d.,/]*\d)?"
    r"|\b(?:ist\s+nicht|no\s+es|n'est\s+pas|non\s+è)\b[^\n.,]*|(?:不是|并非)[^\n。，,]*",
    re.IGNORECASE,
)
_DENIES = ("not", "n't", "neither", "never", "nicht", "no es", "n'est", "non è", "不是", "并非")
"""Words of which every denial has one; the pattern is slow."""


def without_denials(text: str) -> str:
    """Remove what a text says the answer is not: "the answer is not 5", "it isn't 7"."""
    lower = text.lower()
    return _DENIAL.sub("", text) if any(word in lower for word in _DENIES) else text


_BRACKET = re.compile(r"[<\[◁]")
"""A character that every tag has."""


def after_thinking(text: str) -> str:
    """Return the text after the reasoning; a text with truncated reasoning has no answer and gives an empty string."""
    if not _BRACKET.search(text):
        return text
    end = deque(_END_OF_THOUGHT.finditer(text), maxlen=1)
    remainder = text[end[0].end() :] if end else text
    start = _START_OF_THOUGHT.search(remainder)
    return remainder[: start.start()] if start else remainder


def answer_part(text: str) -> tuple[str, bool]:
    r"""Return the part of a text that holds its answer, and whether it is the content of an ``<answer>`` tag.

    The part is the content of the last closed tag, else of the last open one, else all text after the reasoning. A box
    whose backslash was lost in an escape is restored.
    """
    text = after_thinking(text)
    if "oxed" in text:
        text = _LOST_BACKSLASH.sub(r"\\boxed{", text)
    if not _BRACKET.search(text):
        return text, False
    closed = deque(_CLOSED.finditer(text), maxlen=1)
    before = text[: closed[0].start()] if closed else text
    opened = deque(_OPENED.finditer(before), maxlen=1)
    return (before[opened[0].end() :].strip(), True) if opened else (text, False)


def boxed(text: str) -> str | None:
    r"""Return the content of the last box; boxes joined by a comma, "and" or "or" form one list.

    Empty boxes, as in "put it into ``\boxed{}``", count only if there are no others and no statement follows.
    """
    every = closed_boxes(text)
    inner = innermost_boxes([box for box in every if box.braces])
    full = [box for box in inner if box.content]
    if not inner:
        full = [box for box in map(_token, every) if box.content]
    elif not full:
        return None if stated(text[inner[-1].end :]) else ""
    if not full:
        return None
    start, parts = full[-1].start, [full[-1].content]
    for box in reversed(full[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text[box.end : start]):
            break
        start = box.start
        if box.content not in parts:
            parts.insert(0, box.content)
    return ", ".join(parts)


def _token(box: Box) -> Box:
    """Reduce a box without braces to the number, letter or group that it begins with."""
    token = _TOKEN.match(box.content)
    content = (token[1] or token[2] or token[0]).strip() if token else ""
    return Box(box.start, box.end, content, braces=False)


def marked(text: str) -> str | None:
    """Return the line after the last ``####``, or None if that line is a Markdown heading followed by prose."""
    marks = deque(_MARK.finditer(text), maxlen=1)
    if not marks:
        return None
    line = _REASON.split(_CONTROL.sub("", marks[0][1]), maxsplit=1)[0].strip().rstrip("# ")
    remainder = text[marks[0].end() :].strip()
    words = _FINAL_WORDS.match(line)
    if words:
        return line[words.end() :].strip(" *_:") or (remainder.splitlines() or [""])[0].strip()
    bare = line.strip(" *_:\"'")
    bare = bare[1:-1] if re.fullmatch(r"<[^<>]{1,40}>", bare) else bare
    if remainder and (_HEADING.match(bare) or not re.match(r"[-+−–$£€¥₹\\({\[.\d]|[A-Z]\Z", bare)):
        return None
    return bare if bare != line and line.startswith(("*", "_", "<", '"', "'")) else line


_SIGNALS = (
    *(
        "answer",
        "result",
        "respuesta",
        "resposta",
        "risposta",
        "réponse",
        "reponse",
        "antwort",
        "lösung",
        "ergebnis",
    ),
    *("ответ", "результат", "答", "正解", "답"),
)
"""Words of which every statement has one; looking for them is a tenth of the time of the pattern."""


def stated(text: str) -> str | None:
    """Return the answer in the last statement such as "the answer is 5", except a negated one."""
    lower = text.lower()
    if not any(word in lower for word in _SIGNALS):
        return None
    for match in reversed(deque(_STATED.finditer(text), maxlen=8)):
        statement = text[match.end() :].partition("\n")[0]
        if _NEGATED.match(statement):
            continue
        statement = _CONTROL.sub("", statement).strip()
        if not statement.strip("*_ :"):
            statement = (text[match.end() :].strip("*_ :\n").splitlines() or [""])[0]
        statement = _SENTENCE_END.split(statement.strip(" *_:"), maxsplit=1)[0].strip(" *_:")
        return statement or None
    return None


LONGEST_TAG = 200
"""Characters of a tag's content that can be an answer without a box, a mark or a statement; longer ones are prose."""


def final_answer(text: str) -> str | None:
    r"""Return the claimed answer: the last box, else the line after the last ``####``; within any last ``<answer>``."""
    text, tagged = answer_part(text)
    claim = boxed(text)
    if claim is None:
        claim = marked(text)
    if claim is None and tagged:
        claim = stated(text) or (text if len(text) <= LONGEST_TAG else None)
    return claim
