"""The three ways of attention over a pack agree, and memory is proportional to the tokens of a pack."""

import time

import pytest
import torch
from torch import nn

from cropi_core.gradients import attention
from cropi_core.gradients.attention import (
    MASK_ENTRIES,
    MASK_ENTRIES_A_TOKEN,
    Products,
    attend_by_sequence,
    attend_in_rows,
    attend_without_masks,
    attending,
    packed_attention,
)
from cropi_core.gradients.packing import make_pack
from tests.support.features import plain_kernel

CPU = torch.device("cpu")
LENGTHS = [(5, [4, 1, 9]), (1, [3]), (7, [2, 12])]


def packed(lengths):
    """Pack prompts and completions of given lengths."""
    return make_pack([[0] * n for n, _ in lengths], [[[0] * n for n in group] for _, group in lengths], CPU)


def computed(way, pack, products):
    """Return outputs and gradients of one way, for four heads that share two key heads."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(len(pack.ids), heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    ]
    out = way(pack, *tensors, products).reshape(len(pack.ids), -1)
    return [out, *torch.autograd.grad(out, tensors, torch.randn(out.shape, generator=generator))]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_ways_of_attention_agree(window, softcap, monkeypatch):
    """Shared key heads, sliding windows and soft caps; the blocks are shorter than the sequences."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    pack, products = packed(LENGTHS), Products(0.35, window, softcap)
    ways = [attend_by_sequence]
    if softcap is None:
        ways.append(lambda pack, *rest: attend_without_masks(plain_kernel, pack.sequences, *rest))
    expected = computed(attend_in_rows, pack, products)
    for way in ways:
        for value, reference, bound in zip(
            computed(way, pack, products), expected, (2e-7, 2e-6, 2e-6, 2e-6), strict=True
        ):
            assert float((value - reference).detach().norm() / reference.norm()) < bound


def test_a_long_pack_is_read_without_masks():
    """The layer itself chooses: no mask exists after a pass over a pack whose masks would be large."""
    many_short = [(20, [60] * 8)] * 150  # 16 M entries, and 80 keys a token
    for lengths, masked in (([(20, [40] * 8)], True), (many_short, True), ([(64, [2048])], False)):
        pack = packed(lengths)
        assert (pack.mask_size <= max(MASK_ENTRIES, MASK_ENTRIES_A_TOKEN * len(pack.ids))) == masked
        heads = torch.randn(1, 2, len(pack.ids), 4)
        with attending(pack):
            packed_attention(nn.Identity(), heads, heads, heads, None)
        assert ("padded_rows" in vars(pack)) == masked


def layout_bytes(tokens):
    """Return the bytes of a pack of 8 completions and of its layout without masks."""
    pack = packed([(tokens // 8, [tokens // 8] * 7)])
    tensors = [
        x for x in (*vars(pack).values(), *vars(pack.sequences).values()) if isinstance(x, torch.Tensor)
    ]
    return sum(x.nbytes for x in tensors)


def test_the_bytes_of_a_pack_are_proportional_to_its_tokens():
    assert layout_bytes(32_768) <= 2.2 * layout_bytes(16_384)
    assert layout_bytes(16_384) < 100 * 16_384


def test_a_pack_of_16k_tokens_takes_a_tenth_of_a_second():
    times = []
    for _ in range(3):
        begin = time.process_time()
        _ = packed([(1024, [15_360])]).sequences
        times.append(time.process_time() - begin)
    assert min(times) < 0.1
