"""Count the GPU memory of each step from the policy's shape and the settings, and compare it with a card.

    needs = device_needs(config, Shape.of(policy_config, config.gradients.layers), prompt_tokens=256, card=card)
    needs[0].step, needs[0].total, needs[0].parts, fault(needs[0], card)

Nothing runs on a GPU. The bytes of activations were measured on the CPU, where every tensor that a pass creates can be
followed (``tests/cropi_core/planning/test_device_memory.py`` measures them again): they are linear in the widths of the
policy. All numbers are for one GPU; a step that uses several needs as much on each.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cropi_core.gradients import PIECE_BYTES, folded_sizes, parameter_names
from cropi_core.planning.cards import Card
from cropi_core.rollouts import BATCH_BYTES as PARITY_BYTES
from data_schemas import Config, Layers, Projection, Runtime, Sampling, Vllm

SPARE_BYTES = 1.5e9
"""Left to CUDA's context, the workspaces of its libraries and NCCL; our assumption, not measured."""
TRAINED_BYTES = 16
"""Of a parameter that trains: float32 weight, gradient and AdamW's two moments."""
EIGHT_BIT = ("adamw_bnb_8bit", "paged_adamw_8bit")
"""Optimizers whose two moments take two bytes."""
LOSS_TOKENS, LOSS_ENTRIES = 4096, 32_768
"""Completion tokens and vocabulary entries whose logits TRL's loss computes together, in the type of the products: TRL
1.16, ``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE``. A kernel of the GPU turns them into their gradient in
place. ``tests/cropi_core/training/test_loss_memory.py`` compares both numbers with the installed TRL, and measures that
no other memory of the loss depends on tokens times entries."""
SAMPLED_LOGIT_BYTES = 30
"""Of a sequence and vocabulary entry in sampling by transformers: logits, log-probabilities, their float64 sums."""
VLLM_SHARE, COLOCATED_SHARE = 0.92, 0.3
"""``gpu_memory_utilization`` without a setting: of a server of vLLM 0.32, and of vLLM inside TRL 1.16."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a policy that determine its memory.

    Attributes:
        parameters: Number of parameters.
        features: (rows, columns) of each parameter that gradient features are made of; a vector has one column.
        matrices: (outputs, inputs) of those that are linear layers of the decoder.
        layers: Decoder layers.
        backward: Decoder layers that the backward pass of the features goes through.
        hidden: Width of the hidden state.
        inner: Width of the feed-forward part.
        query: Numbers of all query heads.
        key: Numbers of all key heads.
        normalised: Numbers of a token that the norms of a layer read, such as two hidden states.
        vocabulary: Rows of the output layer.
        largest: Parameters of a decoder layer.
        measured: Bytes per token of a gradient pass, if a calibration on a GPU measured them.
        sides: Rows and columns of all linear layers of the decoder, to which adapters are attached.
    """

    parameters: int
    features: tuple[tuple[int, int], ...]
    matrices: tuple[tuple[int, int], ...]
    layers: int
    backward: int
    hidden: int
    inner: int
    query: int
    key: int
    normalised: int
    vocabulary: int
    largest: int
    sides: int
    measured: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, layers: Layers = "all") -> Self:
        """Read the sizes from a model without numbers, as transformers builds it from its configuration."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=False, attn_implementation="eager"
            )
        text: Any = config.get_text_config()
        shapes = {n: (p.shape[0], p.shape[1] if p.dim() == 2 else 1) for n, p in model.named_parameters()}
        chosen = parameter_names(model, layers)
        outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        inside = {n for n, p in model.named_parameters() if id(p) not in outer and p.dim() == 2}
        depth, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        size = sum(math.prod(shape) for shape in shapes.values())
        return cls(
            parameters=size,
            features=tuple(shapes[n] for n in shapes if n in chosen),
            matrices=tuple(shapes[n] for n in shapes if n in chosen and n in inside),
            layers=depth,
            backward={"all": depth, "last_quarter": math.ceil(depth / 4), "head": 0}[layers],
            hidden=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            query=heads * head,
            key=keys * head,
            normalised=sum(_normalised(n, shapes[n][0], heads, keys) for n in shapes) // depth,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            largest=sum(math.prod(shapes[n]) for n in inside) // depth,
            sides=sum(sum(shapes[n]) for n in inside),
        )


@dataclass(frozen=True)
class Need:
    """The memory that a step needs on each of its GPUs.

    Attributes:
        step: Name of the step.
        parts: Bytes by what they are for.
        advice: What to change if they do not fit.
        least: Bytes that vLLM's share must have at least: weights and one sequence.
        share: Share of the card that servers of vLLM take.
    """

    step: str
    parts: dict[str, float] = field(default_factory=dict)
    advice: str = ""
    least: float = 0.0
    share: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return sum(self.parts.values())


def _normalised(name: str, size: int, heads: int, keys: int) -> int:
    """Return how many numbers of a token a norm reads, given its weight; 0 for another parameter or the last norm."""
    parts = name.split(".")
    if parts[-1] != "weight" or not any(part.isdigit() for part in parts):
        return 0
    if "norm" not in parts[-2] and not parts[-2].startswith("ln_"):
        return 0
    return size * {"q_norm": heads, "k_norm": keys}.get(parts[-2], 1)


def kept_bytes(shape: Shape, number: int, projection: Projection) -> float:
    """Return the bytes per token that the sketches keep of the inputs of linear layers.

    Args:
        shape: The policy.
        number: Bytes of a number of the policy.
        projection: Folds are float32 copies; ``uniform`` and a metric keep whole inputs.
    """
    if _reads_whole(projection):
        return shape.backward * number * (2 * shape.hidden + shape.query + shape.inner)
    if projection.form == "folded":
        return 4 * sum(folded_sizes(m, n, projection)[1] for m, n in shape.matrices)
    return number * math.sqrt(projection.density) * sum(n for _, n in shape.matrices)


def _reads_whole(projection: Projection) -> bool:
    """Whether a sketch reads whole inputs and gradients of a layer, not folds of them."""
    return projection.kind == "none" or projection.form == "uniform" or projection.preconditioner != "none"


def activation_bytes(shape: Shape, number: int) -> tuple[float, float]:
    """Return the bytes per token that a layer keeps for the backward pass, and those in use while one is computed.

    A layer keeps the inputs of its norms in float32 and normalised, the queries and outputs of attention, keys, values,
    and three vectors of the gated feed-forward part.
    """
    kept = 6 * shape.normalised + number * (2 * shape.query + 2 * shape.key + 3 * shape.inner)
    used = 20 * shape.hidden + 6 * shape.normalised + (1 if number == 2 else 12) * shape.inner + 4 * shape.key
    return kept, used


def device_needs(config: Config, shape: Shape, prompt_tokens: float, card: Card | None = None) -> list[Need]:
    """Count the memory of the steps that use a GPU.

    Args:
        config: The configuration.
        shape: Its policy.
        prompt_tokens: Tokens of a prompt; only a small part of the memory depends on it.
        card: The GPU, of which vLLM takes a share; without one, the least that vLLM needs is counted.
    """
    needs = []
    rollouts, runtime = config.rollouts, config.runtime
    if config.needs_rollouts:
        both = (rollouts.pool, rollouts.validation)
        longest = max(both, key=lambda one: one.max_new_tokens)
        needs.append(_sampling("rollouts", rollouts.engine, config, shape, longest, prompt_tokens, card))
    if config.needs_gradients:
        budgets = _halved(runtime.token_budget, 256)
        needs.append(_adjusted(budgets, "token_budget", config, shape, prompt_tokens, card, gradients))
    if config.training.engine != "command":
        micro = _halved(runtime.train_micro_batch, 1)
        needs.append(_adjusted(micro, "train_micro_batch", config, shape, prompt_tokens, card, training))
    evaluation = config.evaluation
    needs.append(
        _sampling("evaluation", evaluation.engine, config, shape, evaluation.sampling, prompt_tokens, card)
    )
    return needs


def fault(need: Need, card: Card) -> str | None:
    """Say why a step does not fit a card, with the values; None if it does."""
    room = card.memory_bytes - SPARE_BYTES
    if need.share > 1:
        return f"vLLM's servers take {need.share:.2f} of the card"
    if need.share and need.least > need.parts["vLLM"]:
        return f"vLLM needs {need.least / 1e9:.1f} GB, and its share is {need.parts['vLLM'] / 1e9:.1f} GB"
    others = need.total - need.parts.get("vLLM", 0.0)
    room -= need.parts.get("vLLM", 0.0) if others else 0.0
    if others > room:
        return f"{others / 1e9:.1f} GB are more than the {room / 1e9:.1f} GB that are free"
    return None


def _halved(value: int, least: int) -> list[int]:
    """List a setting and its halves down to ``least``."""
    values = [value]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return values


Counted = Callable[[Config, Shape, float, "Card | None"], Need]


def _adjusted(
    values: list[int],
    name: str,
    config: Config,
    shape: Shape,
    prompt_tokens: float,
    card: Card | None,
    count: Counted,
) -> Need:
    """Count a step, and advise the largest of some values of a setting of ``runtime`` with which it fits."""
    need = count(config, shape, prompt_tokens, card)
    if card is None or fault(need, card) is None:
        return need
    for value in values[1:]:
        runtime = config.runtime.model_copy(update={name: value})
        other = count(config.model_copy(update={"runtime": runtime}), shape, prompt_tokens, card)
        if fault(other, card) is None:
            return Need(need.step, need.parts, f"runtime.{name}={value}", need.least, need.share)
    return need


def _number(config: Config) -> int:
    return 2 if config.policy.dtype == "bfloat16" else 4


# -- sampling --------------------------------------------------------------------------------------------------------


def _sampling(
    step: str,
    engine: str,
    config: Config,
    shape: Shape,
    sampling: Sampling,
    prompt_tokens: float,
    card: Card | None,
) -> Need:
    """Count a step that samples, by transformers in one process or by servers of vLLM."""
    number, length = _number(config), prompt_tokens + sampling.max_new_tokens
    weights, cache = shape.parameters * number, 2 * shape.layers * shape.key * number * length
    if engine != "vllm":
        rows = config.runtime.generation_rows
        parts = {
            "weights": weights,
            "KV cache": rows * cache,
            "logits": rows * shape.vocabulary * SAMPLED_LOGIT_BYTES,
        }
        return Need(step, parts, "a lower runtime.generation_rows")
    vllm = config.runtime.vllm
    if vllm.base_urls:
        return Need(step)  # servers use memory of their own
    split, share = servers_share(vllm)
    least = (weights + cache) / split + SPARE_BYTES
    parts = {"vLLM": share * card.memory_bytes if card else least}
    if vllm.parity_device != "cpu":
        parts["parity check"] = (
            shape.parameters * 4 + 4 * PARITY_BYTES
        )  # logits, log-probabilities, sorted ones, sums
    advice = (
        "--gpu-memory-utilization in runtime.vllm.arguments, fewer runtime.vllm.servers on a GPU (runtime.vllm.gpus), "
        "or --tensor-parallel-size"
    )
    return Need(step, parts, advice, least, share if card else 0.0)


def servers_share(vllm: Vllm) -> tuple[int, float]:
    """Return how many GPUs a server splits its weights over, and the share that servers take of the fullest GPU."""
    given = dict(argument.split("=", 1) for argument in vllm.arguments if "=" in argument)
    share = float(given.get("--gpu-memory-utilization", VLLM_SHARE))
    split = int(given.get("--tensor-parallel-size", 1))
    if not vllm.gpus:
        return split, share * vllm.servers
    used = Counter(gpu.strip() for gpus in vllm.gpus for gpu in gpus.split(","))
    return split, share * max(used.values())


# -- gradients -------------------------------------------------------------------------------------------------------


def gradients(config: Config, shape: Shape, prompt_tokens: float, card: Card | None = None) -> Need:
    """Count a process that computes gradient features."""
    projection, runtime, number = config.projection, config.runtime, _number(config)
    kept, used = activation_bytes(shape, number)
    copies = kept_bytes(shape, number, projection)
    both = (config.rollouts.pool, config.rollouts.validation)
    longest = prompt_tokens + max(one.max_new_tokens for one in both)
    block = config.gradients.block_rows * max(
        prompt_tokens + one.samples * one.max_new_tokens for one in both
    )
    tokens = min(runtime.token_budget, block)
    activations = tokens * (shape.backward * kept + copies + used)
    if shape.measured is not None:
        activations = tokens * shape.measured
    elif longest > runtime.token_budget:  # read alone, and each layer is computed again in the backward pass
        again = longest * (shape.backward * number * shape.hidden + copies + kept + used)
        activations = max(activations, again)
    parts = {
        "weights": shape.parameters * number,
        "sketches": sketch_bytes(shape, projection),
        "activations": activations,
        "logits": 3.0 * PIECE_BYTES,
        "one layer's gradient": max(
            2 * 4 * m * n if _reads_whole(projection) else 4 * math.prod(folded_sizes(m, n, projection))
            for m, n in shape.features
        ),
    }
    if projection.preconditioner != "none":
        parts["second moments"] = 4.0 * shape.parameters
    width = sum(m * n for m, n in shape.features) if projection.kind == "none" else 2 * projection.k
    parts["sums"] = 4.0 * config.gradients.block_rows * width
    workers = _workers_on_a_gpu(runtime)
    parts = {name: workers * size for name, size in parts.items()}
    return Need(
        "gradients",
        parts,
        "projection.form=folded, policy.dtype=bfloat16, or another GPU: a lower runtime.token_budget is not enough",
    )


def _workers_on_a_gpu(runtime: Runtime) -> int:
    share = runtime.ray.gpus_per_worker if runtime.ray else None
    return max(1, math.floor(1 / share)) if share else 1


def sketch_bytes(shape: Shape, projection: Projection) -> float:
    """Return the bytes of the buckets of all kept coordinates; ``uniform`` also keeps their places."""
    if projection.kind == "none":
        return 0.0
    if projection.form == "folded":
        return 4.0 * sum(math.prod(folded_sizes(m, n, projection)) for m, n in shape.features)
    coordinates = projection.density * sum(m * n for m, n in shape.features)
    return (12.0 if projection.form == "uniform" else 4.0) * coordinates


# -- training --------------------------------------------------------------------------------------------------------


def batch_phases(
    shape: Shape, number: int, tokens: float, predicted: float, *, recomputes: bool, outer: bool
) -> list[dict[str, float]]:
    """Count a micro-batch at its two largest moments: in the backward pass of the loss, and of the embedding.

    Args:
        shape: The policy.
        number: Bytes of a number in products.
        tokens: Tokens of prompts and completions.
        predicted: Tokens of completions.
        recomputes: Whether only the inputs of layers are kept (``runtime.gradient_checkpointing``).
        outer: Whether output layer and embedding train, so that their gradients exist.
    """
    kept, used = activation_bytes(shape, number)
    layer = kept + number * (2 * shape.hidden + shape.query + shape.inner)
    each = 4 * shape.hidden * shape.layers + layer if recomputes else shape.layers * layer
    tile = number * min(predicted, LOSS_TOKENS) * min(shape.vocabulary, LOSS_ENTRIES)
    gradient = 4.0 * shape.vocabulary * shape.hidden if outer else 0.0
    loss = {"activations": tokens * (each + used), "loss": tile + gradient}
    return [loss, {"gradients of output layer and embedding": 2 * gradient}]


def training(config: Config, shape: Shape, prompt_tokens: float, card: Card | None = None) -> Need:
    """Count a training process: what it keeps, and the largest of sampling, a micro-batch and the optimizer step."""
    settings, runtime = config.training, config.runtime
    launch, sampling = runtime.launch, settings.sampling
    processes = launch.processes if launch else 1
    sharded = bool(launch and (launch.sharded or launch.config))
    shards = processes if sharded else 1
    trained = shape.parameters
    if settings.lora:
        trained = settings.lora.r * shape.sides
    each = TRAINED_BYTES - (6 if settings.trl.optim in EIGHT_BIT else 0)
    parts = {"weights, gradients and moments": each * trained / shards}
    if settings.lora:
        parts["frozen weights"] = 4.0 * shape.parameters / shards
    elif settings.beta > 0:
        parts["reference"] = 4.0 * shape.parameters / shards
    if processes > 1 and not sharded:
        parts["buckets of gradients"] = 4.0 * trained
    if sharded:
        parts["two gathered layers"] = 8.0 * max(shape.largest, shape.vocabulary * shape.hidden)
    bfloat16 = config.policy.dtype == "bfloat16"
    if bfloat16 and not sharded:
        parts["weights in bfloat16"] = 2.0 * shape.parameters
    micro = min(runtime.train_micro_batch, settings.prompts_per_step * sampling.samples // processes)
    length = prompt_tokens + sampling.max_new_tokens
    phases = batch_phases(
        shape,
        _number(config),
        micro * length,
        micro * sampling.max_new_tokens,
        recomputes=runtime.gradient_checkpointing is not False,
        outer=settings.lora is None,
    )
    phases.append({"optimizer step": 4.0 * trained / shards})
    if settings.engine == "transformers":
        rows = min(runtime.generation_rows, settings.prompts_per_step * sampling.samples // processes)
        cache = rows * 2 * shape.layers * shape.key * 4 * length
        phases.append({"KV cache": cache, "logits": rows * shape.vocabulary * SAMPLED_LOGIT_BYTES})
    elif runtime.trl.vllm_mode != "server":
        share = runtime.trl.vllm_gpu_memory_utilization or COLOCATED_SHARE
        size = share * card.memory_bytes if card else 2.0 * shape.parameters + SPARE_BYTES
        if runtime.trl.vllm_enable_sleep_mode:
            phases.append({"vLLM in the process": size})
        else:
            parts["vLLM in the process"] = size
    parts |= max(phases, key=lambda phase: sum(phase.values()))
    return Need(
        "training",
        parts,
        "runtime.launch.sharded=true over more processes, training.lora, or training.trl.optim=paged_adamw_8bit; a "
        "lower train_micro_batch is not enough",
    )
