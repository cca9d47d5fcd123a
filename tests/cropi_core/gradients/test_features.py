"""A stored feature equals the gradient of the objective by autograd, for every batching and layer type."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from cropi_core.errors import ProjectionError
from cropi_core.gradients import lm_head as head
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.packing import make_pack
from cropi_core.gradients.projection import ParameterSketch
from cropi_core.gradients.self_checks import check_packed_logprobs, plain_logprobs
from cropi_core.gradients.store import GradientStore
from cropi_core.policy.loading import load_policy
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.runtime import Runtime
from tests.support import processes
from tests.support.features import EXACT, L_MAX, extract, kept_of, relative
from tests.support.models import random_rollouts, save_tiny, tiny_model


def reference(policy, rollouts, objective, temperature):
    """Differentiate the surrogate directly, one unpadded completion at a time, in float64."""
    model, _ = load_policy(policy, "float32", "cpu", attention="eager")
    model = model.double()
    parameters = list(model.parameters())
    groups = {}
    for row in pq.read_table(rollouts).to_pylist():
        if row["reward"] is not None:
            groups.setdefault(row["prompt_id"], []).append(row)
    features = {}
    for name, rows in groups.items():
        rewards = np.array([r["reward"] for r in rows])
        if np.ptp(rewards) == 0:
            continue
        masks = [torch.tensor(r.get("completion_mask") or [True] * len(r["completion_ids"])) for r in rows]
        lengths = [int(mask.sum()) for mask in masks]
        centred = rewards - rewards.mean()
        advantage = centred / (rewards.std(ddof=1) + 1e-4) if objective.scale_rewards else centred
        total = torch.zeros((), dtype=torch.float64)
        for row, a, length, mask in zip(rows, advantage, lengths, masks, strict=True):
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            logits = model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1] / temperature
            logp = logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
            logp = logp[mask]
            log_ratio = logp - torch.tensor(row["behavior_logprobs"], dtype=torch.float64)[mask]
            ratio = log_ratio.exp()
            # The surrogate itself, differentiated through the ratio: ∇ρ = ρ ∇ log π.
            if objective.ratio == "none":
                term = logp * a
            elif objective.ratio == "token":
                term = ratio * a
            elif objective.ratio == "token_clip":
                e = objective.clip_epsilon
                term = torch.minimum(ratio * a, ratio.clamp(1 - e, 1 + e) * a)
            elif objective.ratio == "sequence":
                term = log_ratio.mean().exp().detach() * logp * a
            else:
                term = log_ratio.sum().exp().clamp(max=objective.ratio_cap).detach() * logp * a
            scale = {
                "grpo": 1 / (len(rows) * length),
                "dapo": 1 / sum(lengths),
                "bnpo": 1 / sum(lengths),
                "dr_grpo": 1 / (len(rows) * L_MAX),
            }[objective.loss_type]
            total = total + scale * term.sum()
        gradient = torch.autograd.grad(total, parameters)
        features[name] = torch.cat([g.flatten() for g in gradient]).numpy()
    return features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tie"),
    [
        ("llama", True),
        ("llama", False),
        ("qwen2", True),
        ("qwen3", False),
        ("mistral", False),
        ("gemma", True),
        ("gemma2", True),
        ("gemma3_text", True),
        ("gpt2", True),
    ],
)
def test_feature_is_the_gradient(tmp_path, kind, tie):
    """Linear with and without bias, Conv1D, norms of every kind, learned positions, windows, soft caps, tied heads."""
    policy = save_tiny(tmp_path / "policy", kind, tie=tie)
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=3)
    store = extract(tmp_path, policy, rollouts)
    long = extract(
        tmp_path, policy, rollouts, "long", token_budget=1
    )  # every completion alone, its layers twice
    expected = reference(policy, rollouts, Objective(), 1.0)
    for i, name in enumerate(store.column("prompt_id")):
        row = store.rows(i, i + 1)[0]
        assert relative(long.rows(i, i + 1)[0], row) < 2e-6
        assert relative(row, expected[name]) < 1e-5
        assert store.column("norm")[i] == pytest.approx(np.linalg.norm(expected[name]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["none", "token", "token_clip", "sequence", "sequence_truncated"])
def test_every_objective_is_its_surrogate(tmp_path, loss_type, ratio):
    """Estimator mistakes 5 and 6: the scoring loss equals the training loss for all lengths."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=2, seed=1)
    objective = Objective(loss_type=loss_type, ratio=ratio, scale_rewards=loss_type != "dr_grpo")
    store = extract(tmp_path, policy, rollouts, objective=objective)
    for i, expected in enumerate(reference(policy, rollouts, objective, 1.0).values()):
        assert relative(store.rows(i, i + 1)[0], expected) < 1e-5


@pytest.mark.parametrize("objective", [("grpo", "token_clip"), ("dapo", "sequence"), ("dr_grpo", "token")])
def test_only_the_tokens_that_the_policy_sampled_are_scored(tmp_path, objective):
    """In a conversation, what the policy was told conditions its later tokens and has no gradient of its own."""
    policy = save_tiny(tmp_path / "policy")
    masked = [(p, s) for p in range(2) for s in range(3)]
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=3, seed=3, masked=masked)
    table = pq.read_table(rollouts)
    assert any(mask and not all(mask) for mask in table["completion_mask"].to_pylist())
    loss, ratio = objective
    settings = Objective(loss_type=loss, ratio=ratio, scale_rewards=loss != "dr_grpo")
    store = extract(tmp_path, policy, rollouts, objective=settings)
    alone = extract(tmp_path, policy, rollouts, "alone", objective=settings, token_budget=1)
    expected = reference(policy, rollouts, settings, 1.0)
    for i, name in enumerate(store.column("prompt_id")):
        assert relative(store.rows(i, i + 1)[0], expected[name]) < 1e-5
        assert relative(alone.rows(i, i + 1)[0], store.rows(i, i + 1)[0]) < 2e-6
    unread = [
        [p if seen else -99.0 for p, seen in zip(row, mask or [True] * len(row), strict=True)]
        for row, mask in zip(
            *(table[n].to_pylist() for n in ("behavior_logprobs", "completion_mask")), strict=True
        )
    ]
    place = table.schema.get_field_index("behavior_logprobs")
    changed = table.set_column(
        place, table.schema.field(place), pa.array(unread, table.schema.field(place).type)
    )
    pq.write_table(changed, tmp_path / "changed.parquet")
    other = extract(tmp_path, policy, tmp_path / "changed.parquet", "changed", objective=settings)
    assert (other.rows(0, 3) == store.rows(0, 3)).all()
    for name in ("ess", "kl", "max_ratio", "entropy"):
        assert (other.column(name) == store.column(name)).all()


def test_temperature_is_that_of_the_rollouts(tmp_path):
    """Mistake 4: for samples at T = 0.5, the ratio and the gradient are at T = 0.5."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=2, temperature=0.5)
    store = extract(tmp_path, policy, rollouts)
    at_half = reference(policy, rollouts, Objective(), 0.5)
    at_one = reference(policy, rollouts, Objective(), 1.0)
    assert relative(store.rows(0, 1)[0], at_half["p0"]) < 1e-5
    assert relative(store.rows(0, 1)[0], at_one["p0"]) > 0.1


def test_layers_that_are_recomputed_keep_nothing_but_their_inputs(tmp_path):
    """What autograd saves in the forward does not grow with the content of a layer, and the sketch is the same."""
    model, _ = load_policy(save_tiny(tmp_path / "policy", "llama"), "float32", "cpu")
    engine = FeatureEngine(model, Projection(k=64, dtype="float32"))
    pack = make_pack([[1, 2, 3]], [[[4, 5, 6, 7, 8]]], torch.device("cpu"))
    saved, rows = {}, {}
    for recompute in (False, True):
        out, kept = engine.accumulators(1), []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        def ones(prompts, logprobs, entropy):
            saved[recompute] = sum(kept)  # noqa: B023 - called inside the loop
            return torch.ones(len(logprobs))

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.project(pack, 1.0, ones, out, recompute=recompute)
        rows[recompute] = engine.features(out)
    engine.close()
    assert torch.equal(rows[False], rows[True])
    assert saved[True] < saved[False] / 3


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_any_micro_batch_split_gives_the_same_rows(tmp_path, budget):
    """Mistakes 3 and 5: neither padding nor the number of micro-batches affects a row, even when a group is split."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=6, dead=(2,), ungraded=((1, 0), (4, 3)))
    for advantages in ("plain", "reweighted"):
        objective = Objective(advantages=advantages)
        whole = extract(tmp_path, policy, rollouts, f"whole-{advantages}", objective)
        split = extract(tmp_path, policy, rollouts, f"split-{advantages}", objective, token_budget=budget)
        for i in np.flatnonzero(whole.column("status") == 0):
            assert relative(split.rows(i, i + 1)[0], whole.rows(i, i + 1)[0]) < 1e-5
            assert split.column("ess")[i] == pytest.approx(whole.column("ess")[i], rel=1e-4)


def test_neighbours_and_order_do_not_enter_a_row(tmp_path):
    """The same prompt alone, with other prompts, and with other prompts in another order."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=6)
    table = pq.read_table(rollouts)
    order = np.argsort([-int(n[1:]) for n in table["prompt_id"].to_pylist()], kind="stable")
    pq.write_table(table.take(order), tmp_path / "reversed.parquet")
    one = table.filter([n == "p3" for n in table["prompt_id"].to_pylist()])
    pq.write_table(one, tmp_path / "one.parquet")
    stores = [
        extract(tmp_path, policy, path, path.stem)
        for path in (rollouts, tmp_path / "reversed.parquet", tmp_path / "one.parquet")
    ]
    rows = [s.rows(i, i + 1)[0] for s in stores for i in np.flatnonzero(s.column("prompt_id") == "p3")]
    assert len(rows) == 3
    assert relative(rows[1], rows[0]) < 1e-5
    assert relative(rows[2], rows[0]) < 1e-5


@pytest.mark.slow
def test_bytes_do_not_depend_on_shards_or_workers(tmp_path):
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=9)
    sketch = Projection(k=64, density=0.5, dtype="float32")
    base = extract(tmp_path, policy, rollouts, "a", projection=sketch)
    for name, layout, workers in [
        ("b", Gradients(rows_per_shard=2, block_rows=2), 1),
        ("c", Gradients(rows_per_shard=8, block_rows=2), 1),
        ("d", Gradients(rows_per_shard=2, block_rows=2), 2),
    ]:
        other = extract(tmp_path, policy, rollouts, name, projection=sketch, layout=layout, workers=workers)
        assert other.rows(0, 9).tobytes() == base.rows(0, 9).tobytes()
        for column in ("norm", "ess", "entropy", "status", "tokens"):
            assert other.column(column).tobytes() == base.column(column).tobytes()


def test_dead_prompts_are_skipped_with_a_reason(tmp_path, monkeypatch):
    """Mistakes 9 and 14: equal rewards are skipped with a status; not gradable is dropped, not zero."""
    policy = save_tiny(tmp_path / "policy")
    ungraded = ((1, 0), (1, 1), (1, 2), (2, 1))
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=3, dead=(0,), ungraded=ungraded)
    seen = []
    project = FeatureEngine.project
    monkeypatch.setattr(
        FeatureEngine, "project", lambda s, b, *a, **o: seen.append(len(b.lengths)) or project(s, b, *a, **o)
    )
    store = extract(tmp_path, policy, rollouts)
    assert store.column("status").tolist() == [1, 3, 0]
    assert sum(seen) == 1
    assert not store.rows(0, 2).any()
    expected = reference(policy, rollouts, Objective(), 1.0)["p2"]
    assert relative(store.rows(2, 3)[0], expected) < 1e-5


@pytest.mark.slow
def test_projected_is_the_projection_of_the_full_gradient(tmp_path):
    """Both forms: the engine's shortcuts (rows and columns, touched embedding rows) equal P·S of the whole gradient."""
    policy = save_tiny(tmp_path / "policy", tie=False)
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=3)
    full = extract(tmp_path, policy, rollouts, "full")
    for form in ("folded", "factored", "uniform"):
        projection = Projection(k=64, density=0.3, form=form, min_side=10, dtype="float32")
        store = extract(tmp_path, policy, rollouts, form, projection=projection)
        model, _ = load_policy(policy, "float32", "cpu")
        engine = FeatureEngine(model, projection)
        for i in range(3):
            gradient, expected, begin = full.rows(i, i + 1)[0], np.zeros(64), 0
            for sketch in engine.sketches.values():
                m, n = sketch.shape
                block = gradient[begin : begin + m * n]
                begin += m * n
                cells = sketch.cells.numpy()
                signs = np.where(cells >= 64, -1.0, 1.0)
                np.add.at(expected, cells % 64, sketch.scale * signs * kept_of(sketch, block))
            assert relative(store.rows(i, i + 1)[0], expected) < 1e-5


class _Odd(nn.Module):
    """A module that squares its parameter, so it is not affine."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight**2


def test_a_module_out_of_reach_is_named():
    model, _ = tiny_model()
    model.model.layers[0].input_layernorm = _Odd(32)
    with pytest.raises(ProjectionError, match=r"_Odd.*model\.layers\.0\.input_layernorm\.weight"):
        FeatureEngine(model, EXACT)


def test_a_module_that_is_never_called_is_named(tmp_path):
    model, _ = tiny_model(tie=False)
    lost = nn.Linear(32, 32)
    model.model.layers[1].extra = lost
    engine = FeatureEngine(model, EXACT)
    pack = make_pack([[4, 5, 6]], [[[7, 8, 9], [10, 11]]], torch.device("cpu"))
    with pytest.raises(ProjectionError, match=r"layers\.1\.extra"):
        engine.project(pack, 1.0, lambda _, logp, __: torch.ones_like(logp), engine.accumulators(1))


def test_a_mixture_of_experts_is_refused_by_name():
    model, _ = tiny_model("mixtral", tie=False)
    with pytest.raises(ProjectionError, match=r"experts.*mixture of experts"):
        FeatureEngine(model, EXACT)


def test_adapters_are_parameters_like_any_other():
    """LoRA through PEFT: the features are the gradient of the adapter, and of nothing else."""
    model, _ = tiny_model()
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    trained = {n: p for n, p in adapted.get_base_model().named_parameters() if p.requires_grad}
    prompt, completions = [4, 5, 6], [[7, 8, 9], [10, 11]]
    total = torch.zeros(())
    for completion in completions:
        ids = torch.tensor([prompt + completion])
        logp = adapted(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
        total = total + logp.gather(1, torch.tensor(completion)[:, None]).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(trained.values()))]).numpy()
    engine = FeatureEngine(adapted, EXACT)
    assert set(engine.sketches) == set(trained)
    assert all("lora_" in name for name in trained)
    out = engine.accumulators(1)
    pack = make_pack([prompt], [completions], torch.device("cpu"))
    engine.project(pack, 1.0, lambda _, logp, __: torch.ones_like(logp), out)
    assert relative(engine.features(out)[0].numpy(), expected) < 1e-5


def test_a_model_that_reads_a_pack_as_something_else_is_refused():
    """A layer that reads its neighbor outside of attention: in a pack, that may be another prompt's token."""
    model, _ = tiny_model()

    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + 0.5 * x.roll(1, dims=1))

    model.model.layers[0].mlp = Shifted(model.model.layers[0].mlp)
    expected = plain_logprobs(model)
    with pytest.raises(ProjectionError, match="mixes tokens outside of its attention layers"):
        check_packed_logprobs(FeatureEngine(model, EXACT), expected)


@pytest.mark.slow
def test_a_long_vocabulary_is_read_in_pieces(tmp_path, monkeypatch):
    """Groups with more logits than a piece are read twice, others together: the rows are the same."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=5)
    whole = extract(tmp_path, policy, rollouts, "whole")
    for size in (1, 7, 30):
        monkeypatch.setattr(head, "PIECE_BYTES", size * 4 * 44)
        pieces = extract(tmp_path, policy, rollouts, f"pieces-{size}")
        for i in range(5):
            assert relative(pieces.rows(i, i + 1)[0], whole.rows(i, i + 1)[0]) < 1e-5


def tf32(x):
    """Round float32 to the 10 bits of TF32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("form", ["folded", "factored", "uniform"])
def test_operands_of_ten_bits_change_a_feature_by_less_than_a_thousandth(form, monkeypatch):
    """What TF32 does on a GPU, emulated: the operands of the sketches' products are rounded, the sums are float32."""
    rows, add = [], ParameterSketch.add_outer
    for rounded in (torch.Tensor.float, tf32):
        monkeypatch.setattr(
            ParameterSketch,
            "add_outer",
            lambda s, left, right, *rest, rounded=rounded: add(s, rounded(left), rounded(right), *rest),
        )
        model, _ = tiny_model()
        engine = FeatureEngine(model, Projection(k=256, form=form, min_side=8, dtype="float32"))
        pack = make_pack([[4, 5], [6]], [[[7, 8, 9, 10], [11, 12, 9, 9, 4]], [[5, 6]]], torch.device("cpu"))
        out = engine.accumulators(2)
        engine.project(pack, 1.0, lambda _, logp, __: torch.ones_like(logp), out)
        rows.append(engine.features(out).numpy())
    assert 1e-6 < relative(rows[1], rows[0]) < 1e-3


@pytest.mark.parametrize("form", ["folded", "uniform"])
def test_the_output_layer_of_a_long_prompt_is_sketched_once(form, monkeypatch):
    """Its pieces are summed first: on a GPU, each sketch adds to scattered places."""
    sketched, add = [], ParameterSketch.add_block
    monkeypatch.setattr(
        ParameterSketch, "add_block", lambda s, *rest: sketched.append(s.name) or add(s, *rest)
    )
    rows = []
    for tokens in (3, 1000):
        monkeypatch.setattr(head, "PIECE_BYTES", tokens * 4 * 44)
        model, _ = tiny_model(tie=False)
        engine = FeatureEngine(model, Projection(k=64, form=form, min_side=8, dtype="float32"))
        pack = make_pack([[4, 5], [6]], [[[7, 8, 9, 10], [11, 12, 9, 9, 4]], [[5, 6]]], torch.device("cpu"))
        out = engine.accumulators(2)
        engine.project(pack, 1.0, lambda _, logp, __: torch.ones_like(logp), out)
        rows.append(engine.features(out).numpy())
    assert sketched.count("lm_head.weight") == 4  # two prompts, in pieces and at once
    assert relative(rows[0], rows[1]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folded", "factored", "uniform"])
def test_deterministic_rows_are_bitwise_equal_however_they_are_batched(tmp_path, form):
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=7)
    sketch = Projection(k=64, density=0.5, form=form, min_side=8, dtype="float32")
    stores = [
        extract(
            tmp_path,
            policy,
            rollouts,
            f"{block}-{budget}-{workers}",
            projection=sketch,
            layout=Gradients(rows_per_shard=block, block_rows=block, deterministic=True),
            token_budget=budget,
            workers=workers,
        )
        for block, budget, workers in ((1, 1, 1), (2, 8192, 2), (7, 100, 1))
    ]
    for other in stores[1:]:
        assert other.rows(0, 7).tobytes() == stores[0].rows(0, 7).tobytes()
        assert other.column("ess").tobytes() == stores[0].column("ess").tobytes()


def test_bfloat16_gives_nearly_the_same_directions(tmp_path):
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=4)
    rows = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.zarr"
        extract_gradients(
            policy=Checkpoint(policy, dtype),
            rollouts=rollouts,
            out=out,
            settings=FeatureSettings(projection=EXACT),
            runtime=Runtime(device="cpu"),
        )
        rows[dtype] = GradientStore.open(out).rows(0, 4)
    for a, b in zip(rows["float32"], rows["bfloat16"], strict=True):
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


LIMITED = """
import resource, sys, torch
from pathlib import Path
from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from data_schemas.gradients import Gradients, Projection
from data_schemas.runtime import Runtime
torch.set_num_threads(1)
policy, rollouts, out, spare = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
if spare:
    torch.ones(4, 4) @ torch.ones(4, 4)
    used = int(next(x for x in open("/proc/self/status") if x.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
settings = FeatureSettings(projection=Projection(k=64, dtype="float32"),
                           layout=Gradients(rows_per_shard=64, block_rows=64))
extract_gradients(policy=Checkpoint(policy), rollouts=rollouts, out=out, settings=settings,
        runtime=Runtime(device="cpu", threads=1, token_budget=1 << 20))
"""


@pytest.mark.slow
def test_a_failed_allocation_halves_the_budget_and_says_so(tmp_path):
    """In a process with an address space too small for all prompts at once, the rows equal those without a limit."""
    policy = save_tiny(tmp_path / "policy")
    rollouts = random_rollouts(tmp_path / "r.parquet", prompts=64, samples=16, longest=100)
    outputs = {}
    for name, spare in (("roomy", 0), ("tight", 700 << 20)):
        outputs[name] = processes.run(
            [sys.executable, "-c", LIMITED, policy, rollouts, tmp_path / f"{name}.zarr", str(spare)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert outputs[name].returncode == 0, outputs[name].stderr[-2000:]
    assert "out of memory" not in outputs["roomy"].stderr
    assert "continuing with 524288 tokens per pass" in outputs["tight"].stderr
    roomy, tight = (GradientStore.open(tmp_path / f"{name}.zarr").rows(0, 64) for name in ("roomy", "tight"))
    assert relative(tight, roomy) < 1e-5


def test_frozen_parameters_are_left_out_by_name():
    model, _ = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    engine = FeatureEngine(model, EXACT)
    assert engine.left_out == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" not in engine.sketches
