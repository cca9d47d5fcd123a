"""Plain English: phrases that an engineer would not write do not come back."""

import re

import pytest

from tests.support.paths import CHECKOUT

ROOT = CHECKOUT
BANNED = re.compile(
    r"(?<!there )is no (?:file|directory|device|manifest|letter|number|symbol|JSON|YAML|URL|artifact key|"
    r"safetensors)\b|\bgo(?:es|ne) on\b|whoever|\bof ours\b|as it stands|belongs into|somebody|what is whole|"
    r"\bnobody\b|"
    r"\bbeside our\b|\bby us\b|\bat hand\b|\bhas a say\b|\bfor ever after\b|\bbegun afresh\b|has at its end|"
    r"for want of|learns? by heart|held against|without a word|\bis asked\b|\b(?:be|is|are) believed\b|"
    r"cannot be told(?! apart)|\bbut for\b",
    re.IGNORECASE,
)
CODE = ("cropi_core", "data_schemas", "deployments", "flows", "tasks", "configs", "examples")
TEXTS = ("*.py", "*.md", "*.jinja", "*.yaml")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "changelog.d",
    "benchmarks/README.md",
    "docs",
)


@pytest.mark.parametrize("place", [*CODE, *PAGES])
def test_banned_phrases_do_not_occur(place):
    root = ROOT / place
    paths = [root] if root.is_file() else [path for pattern in TEXTS for path in sorted(root.rglob(pattern))]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in BANNED.finditer(line)
    ]
    assert not found, "\n".join(found)
