"""A server that answers for other weights, well-formed, is taken out, and what it sampled is sampled again."""

from pathlib import Path

import pytest
import torch

from cropi_core.errors import ServerError
from cropi_core.rollouts.sampling import sample_completions
from cropi_core.rollouts.vllm.checks import Expected
from cropi_core.rollouts.vllm.fleet import Endpoint
from cropi_core.rollouts.vllm.sampler import VllmServers, request_seed, vocabulary_of
from data_schemas import Sampling, Vllm
from tests.support.models import tiny_model
from tests.support.policy_peers import PolicyPeer

SAMPLING = Sampling(samples=2, max_new_tokens=6)
SHARDS = {i: [(f"p{i}-{j}", [1, 5 + i, 6 + j]) for j in range(6)] for i in range(3)}
SEED = 7


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return (*tiny_model(seed=0), tiny_model(seed=1)[0])


@pytest.fixture
def peers():
    started: list[PolicyPeer] = []
    yield started
    for peer in started:
        peer.stop()


def sample(model, tokenizer, peers, tmp_path: Path):
    """Sample with servers that have been checked before."""
    settings = Vllm(concurrency=2, recovery_s=0.2, retries=4, parity_completions=2)
    servers = VllmServers(tmp_path, "float32", settings, tmp_path)
    servers.endpoints = [Endpoint(peer.url, "policy") for peer in peers]
    servers.expected = Expected(tmp_path, "float32", model, vocabulary_of(model, tokenizer), 64)
    return {index: groups for index, groups, _ in servers.sample(SHARDS, SAMPLING, SEED)}


def expected(model, tokenizer):
    found = {}
    for index, prompts in SHARDS.items():
        found[index] = [
            sample_completions(
                model, tokenizer, [("p", ids)], SAMPLING, seed=request_seed(SEED, name), rows=64
            )[0]
            for name, ids in prompts
        ]
    return found


def ids(shards):
    return {index: [[one.ids for one in group] for group in groups] for index, groups in shards.items()}


@pytest.mark.parametrize("since", [0, 5])
def test_a_server_with_other_weights_is_removed_and_its_prompts_are_sampled_again(
    models, peers, tmp_path: Path, caplog, since: int
):
    policy, tokenizer, other = models
    peers += [PolicyPeer(policy, tokenizer, other, since, fails=since > 0), PolicyPeer(policy, tokenizer)]
    found = sample(policy, tokenizer, peers, tmp_path)
    assert peers[0].sampled > 0
    assert ids(found) == ids(expected(policy, tokenizer))
    assert f"{peers[0].url} is no longer used; the others continue: shard" in caplog.text
    assert "its log-probabilities differ by" in caplog.text
    assert peers[1].url not in caplog.text


def test_an_error_names_each_server_if_all_have_other_weights(models, peers, tmp_path: Path):
    policy, tokenizer, other = models
    peers += [PolicyPeer(policy, tokenizer, other), PolicyPeer(policy, tokenizer, other)]
    with pytest.raises(ServerError, match=r"no server is left, \d+ of 18") as raised:
        sample(policy, tokenizer, peers, tmp_path)
    assert all(f"{peer.url}: shard" in str(raised.value) for peer in peers)
