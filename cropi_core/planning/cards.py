"""Named GPUs with their memory and matrix rate, for ``cropi plan --card``."""

from dataclasses import dataclass

from cropi_core.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Name on the command line.
        memory_bytes: Nominal memory, with a gigabyte of 10⁹ bytes. An H100 of 80 GB reports 85.5 · 10⁹; the difference
            is left to fragments and to what was not counted.
        bf16_flops: Floating point operations a second of dense bfloat16 products with float32 sums.
        source: Document with both numbers.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    source: str


CARDS = {
    card.name: card
    for card in (
        Card("rtx4090-24gb", 24e9, 165e12, "NVIDIA Ada GPU architecture white paper, GeForce RTX 4090"),
        Card("l4-24gb", 24e9, 121e12, "NVIDIA L4 data sheet, half of the rate with sparsity"),
        Card("l40s-48gb", 48e9, 362e12, "NVIDIA L40S data sheet"),
        Card("a100-40gb", 40e9, 312e12, "NVIDIA A100 data sheet"),
        Card("a100-80gb", 80e9, 312e12, "NVIDIA A100 data sheet"),
        Card("h100-80gb", 80e9, 989e12, "NVIDIA H100 data sheet, SXM, half of the rate with sparsity"),
        Card("h200-141gb", 141e9, 989e12, "NVIDIA H200 data sheet, SXM, half of the rate with sparsity"),
    )
}
"""Cards by name."""


def find_card(name: str) -> Card:
    """Return a card by its name.

    Raises:
        ConfigError: There is no such card; the message lists all.
    """
    if name not in CARDS:
        raise ConfigError(f"--card={name} is not a known card. Choose one of {', '.join(CARDS)}")
    return CARDS[name]
