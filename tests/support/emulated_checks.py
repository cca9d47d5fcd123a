"""What the feature engine does on the emulated device, measured in a separate process and printed as JSON.

    python -m tests.support.emulated_checks DIRECTORY

The tests that use this are in tests/cropi_core/gradients/test_emulated_device.py.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import StepResult, run_step
from cropi_core.errors import StepError
from cropi_core.gradients import attention
from cropi_core.gradients.batches import project_groups
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.groups import OK, Group
from cropi_core.gradients.job import Job
from cropi_core.gradients.packing import make_pack
from cropi_core.progress import Progress
from data_schemas import StepSpec
from data_schemas.gradients import Gradients, Projection
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from tests.support import emulated_device as emulated
from tests.support.features import extract, plain_kernel
from tests.support.models import random_rollouts, save_tiny, tiny_model
from tests.support.tiny import tiny

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2")
FORMS = ("folded", "factored", "uniform")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = [[4, 5, 6], [7, 8]]
COMPLETIONS = [[[4, 5, 9, 8], [3]], [[7, 9, 8, 9, 10, 11, 12]]]


def features(model: Any, form: Any) -> torch.Tensor:
    """Compute the features of two prompts on the model's device."""
    engine = FeatureEngine(model, Projection(k=64, density=0.3, form=form, min_side=8, dtype="float32"))
    out = engine.accumulators(2)
    pack = make_pack(PROMPTS, COMPLETIONS, model.device)
    engine.project(pack, 1.0, lambda _, logprobs, __: torch.ones_like(logprobs), out)
    engine.close()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return engine.features(out).cpu()


def equality(device: torch.device) -> dict[str, float]:
    """Return the relative difference between the device and the CPU, by architecture, element type and form."""
    found = {}
    cases = [(kind, "float32", "folded") for kind in ARCHITECTURES]
    cases += [("llama", dtype, form) for dtype in TYPES for form in FORMS]
    for kind, dtype, form in dict.fromkeys(cases):
        rows = [features(tiny_model(kind)[0].to(TYPES[dtype]).to(d), form) for d in ("cpu", device)]
        found[f"{kind} {dtype} {form}"] = float((rows[1] - rows[0]).norm() / rows[0].norm())
    return found


def float32_products(device: torch.device) -> dict[str, list[int]]:
    """Count products of float32 operands in a pass over a model of each element type: in full, and with TF32."""
    found = {}
    for name, dtype in TYPES.items():
        model = tiny_model("llama")[0].to(dtype).to(device)
        before = emulated.COUNTS.copy()
        features(model, "folded")
        found[name] = [
            emulated.COUNTS["product", torch.float32, tf32] - before["product", torch.float32, tf32]
            for tf32 in (False, True)
        ]
    return found


class Kernel(torch.autograd.Function):
    """The kernel for sequences of various lengths, computed on the CPU: neither pass launches or waits for anything."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bounds: Any, options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Attend; ``bounds`` are those of queries and keys, ``options`` the other arguments of the kernel."""
        ctx.inputs = [x.data_on_cpu.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            ctx.out = partial(plain_kernel, *ctx.inputs, *(b.data_on_cpu for b in bounds))(**options)
        return emulated.EmulatedTensor(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of queries, keys and values."""
        found = torch.autograd.grad(ctx.out, ctx.inputs, gradient.data_on_cpu)
        return *map(emulated.EmulatedTensor, found), None, None


def counts(
    device: torch.device, layers: int = 2, prompts: int = 2, samples: int = 4, tokens: int = 12
) -> dict[str, int]:
    """Count the waits for the device, the copies to it and the launches of one pass over a pack with all its parts."""
    model = tiny_model("llama", layers=layers)[0].to(device)
    engine = FeatureEngine(model, Projection(k=64, density=0.3, min_side=8))
    completions = [[5] * tokens for _ in range(samples)]
    rewards = np.arange(samples) % 2.0
    groups = [
        Group(str(p), [4, 6, 7], completions, [[-1.0] * tokens] * samples, rewards, OK)
        for p in range(prompts)
    ]
    sampling = Sampling(samples=samples, max_new_tokens=tokens)
    job = Job(Checkpoint(Path()), FeatureSettings(), sampling, Runtime())
    before = emulated.COUNTS.copy()
    rows, _ = project_groups(engine, groups, job, 1 << 20)
    rows.cpu()
    engine.close()
    found = emulated.COUNTS - before
    return {
        "waits": found["read"] + found["from device"],
        "copies": found["to device"],
        "launches": found["launch"],
    }


def budgets(device: torch.device) -> dict[str, dict[str, int]]:
    """Count a pass, and one with more of each kind: completions, tokens, layers, prompts; without masks as on a GPU."""

    def kernel(q: Any, k: Any, v: Any, *bounds: Any, **options: Any) -> Any:
        options |= {"most_q": bounds[2], "most_k": bounds[3]}
        return Kernel.apply(q, k, v, bounds[:2], options)

    chosen, attention._kernel = attention._kernel, lambda *_: kernel
    try:
        more = {"base": {}, "samples": {"samples": 8}, "tokens": {"tokens": 24}}
        more |= {"layers": {"layers": 4}, "prompts": {"prompts": 4}}
        return {name: counts(device, **change) for name, change in more.items()}
    finally:
        attention._kernel = chosen


def mixed(device: torch.device) -> str:
    """Return what the device says about an operand on the CPU."""
    try:
        torch.zeros(3, device=device).add(torch.ones(3))
    except emulated.MixedDevicesError as error:
        return str(error)
    return ""


def store(folder: Path) -> float:
    """Compute a gradient store on both devices, and return the largest relative difference of a row."""
    policy, rollouts = save_tiny(folder / "policy"), random_rollouts(folder / "r.parquet", prompts=3)
    rows = [
        extract(
            folder, policy, rollouts, device, device=device, projection=Projection(k=64, dtype="float32")
        ).rows(0, 3)
        for device in ("cpu", emulated.NAME)
    ]
    return float(max(np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(*rows, strict=True)))


def models() -> int:
    """Count the models that are still in memory, on any device; none is collected for this."""
    return sum(isinstance(x, PreTrainedModel) for x in gc.get_objects())


def left(folder: Path) -> dict[str, list[int]]:
    """Run a curriculum on the device; count its tensors, and all models, after each step and after a failed one."""
    config, store = tiny(stages=1, runtime={"device": emulated.NAME}), Store(folder / "root")
    found: dict[str, list[int]] = {}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection by chance would hide what a step leaves

    def fail(progress: Progress) -> None:
        raise StepError("stopped by the check")

    def execute(spec: StepSpec) -> StepResult:
        if spec.step in ("gradients", "training"):
            try:
                run_step(spec, store, report=fail)
            except StepError:  # the error, with its frames, is still there
                found[f"{spec.slot} failed"] = [len(emulated.live()), models()]
        result = run_step(spec, store)
        found[spec.slot] = [len(emulated.live()), models()]
        return result

    run_curriculum(config, store, execute)
    gc.enable()
    return found


def in_parent(folder: Path) -> int:
    """Count the device's tensors in the process that starts workers, when the first of them is about to start."""
    counts: list[int] = []

    def stop(progress: Progress) -> None:
        counts.append(len(emulated.live()))
        raise StepError("stopped by the check")

    with suppress(StepError):
        extract_gradients(
            policy=Checkpoint(folder / "policy"),
            rollouts=folder / "r.parquet",
            out=folder / "workers.zarr",
            settings=FeatureSettings(layout=Gradients(rows_per_shard=1, block_rows=1)),
            runtime=Runtime(device=emulated.NAME, workers=2),
            report=stop,
        )
    return counts[0]


def main(folder: Path) -> None:
    """Print the results of all checks, or the traceback of the first that fails."""
    torch.set_num_threads(1)
    device = emulated.install()
    try:
        found = {"equality": equality(device), "mixed": mixed(device), "store": store(folder)}
        found |= {"products": float32_products(device), "budgets": budgets(device)}
        found |= {"left": left(folder), "in_parent": in_parent(folder)}
        found["workspace"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        print(json.dumps(found), flush=True)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
