"""The memory of a micro-batch of TRL's loss, as a plan counts it: measured on the CPU, which can follow tensors."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl", reason="training needs the extra `train`")

from trl.kernels import chunked_logprob
from trl.trainer import utils

from cropi_core.planning import device_memory
from cropi_core.policy.loading import load_policy
from data_schemas.gradients import Objective
from data_schemas.training import Training
from tests.support.live_memory import LiveBytes
from tests.support.training import loss_trainer, write_policy

WIDTH, ENTRIES, TOKENS = 64, (2048, 4096), 1024
SAMPLES, PROMPT = 8, 2
TILE = (64, 256)
CPU_TILE_BYTES = 35 * TILE[0] * TILE[1]


def peak(tokenizer, directory, entries, *, tied, recomputes):
    """Return the bytes of a micro-batch whose gradients are added to others, and the shape of the policy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=entries,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    training = Training.model_validate({"sampling": {"samples": SAMPLES}, "prompts_per_step": 1})
    trainer = loss_trainer(model, tokenizer, directory, training, Objective(), "bfloat16")
    model.train()
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, entries, (SAMPLES, TOKENS // SAMPLES))
    prompts = torch.full((SAMPLES, PROMPT), 4)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.randn(SAMPLES),
        "num_items_in_batch": torch.tensor(TOKENS),
    }
    for parameter in model.parameters():  # as left by the micro-batch before
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        trainer._compute_loss(model, inputs).backward()
    return live.peak, device_memory.Shape.of(config)


def test_the_tiles_of_the_installed_trl_are_those_of_a_plan():
    assert chunked_logprob.TOKEN_CHUNK_SIZE == device_memory.LOSS_TOKENS
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == device_memory.LOSS_ENTRIES


@pytest.mark.parametrize(("tied", "recomputes"), [(True, False), (False, True)])
def test_a_micro_batch_takes_the_counted_bytes(tmp_path, monkeypatch, tied, recomputes):
    """Activations, one tile of logits, the gradient of the output layer, and nothing of tokens times entries.

    The tiles are small here, because the CPU takes 35 bytes more for each number of a tile, in float32 steps that a
    GPU's kernel does in place. An earlier plan counted 40 bytes for each token and entry, from a run whose tokens and
    entries were both fewer than those of a tile.
    """
    for module, name, size in (
        (chunked_logprob, "TOKEN_CHUNK_SIZE", TILE[0]),
        (device_memory, "LOSS_TOKENS", TILE[0]),
        (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE[1]),
        (device_memory, "LOSS_ENTRIES", TILE[1]),
    ):
        monkeypatch.setattr(module, name, size)
    _, tokenizer = load_policy(write_policy(tmp_path / "policy", seed=0), "float32", "cpu")
    peaks = []
    for entries in ENTRIES:
        measured, shape = peak(tokenizer, tmp_path, entries, tied=tied, recomputes=recomputes)
        phases = device_memory.batch_phases(
            shape, 2, TOKENS + SAMPLES * PROMPT, TOKENS, recomputes=recomputes, outer=True
        )
        counted = max(sum(phase.values()) for phase in phases) + CPU_TILE_BYTES
        assert 0.97 <= counted / measured <= 1.5
        peaks.append(measured)
    assert peaks[1] - peaks[0] <= 1.1 * 4 * WIDTH * (ENTRIES[1] - ENTRIES[0])
