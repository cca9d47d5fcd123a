"""A tiny policy, its tables, and stages of training on them."""

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cropi_core.progress import silent
from cropi_core.rewards.verifier import Verifier
from cropi_core.training.arguments import trainer_arguments
from cropi_core.training.draws import Draws
from cropi_core.training.files import StageFiles
from cropi_core.training.stage import train
from cropi_core.training.trainer import Stage, StageTrainer, Watch, build_trainer
from data_schemas.gradients import Objective
from data_schemas.grading import Grading
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime
from data_schemas.tables import PROMPTS, SELECTION
from data_schemas.training import Training

VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "0", "1", "=", "+"])}


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}+"


def write_policy(directory: Path, seed: int, template: str | None = TEMPLATE) -> Path:
    """Write a policy with eight tokens and 8,000 parameters: at random it answers `1` about one time in ten."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_tables(directory: Path, count: int = 12, **changes: Any) -> tuple[Path, Path]:
    """Write a pool of ``count`` prompts of different lengths; every other one is selected."""
    rows = [
        {
            "prompt_id": f"p{i:02d}",
            "source": "binary",
            "messages": [{"role": "user", "content": f"{i:b}="}],
            "answer": "1",
            "verifier": "exact",
            "level": None,
            "tags": [],
        }
        | changes
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), directory / "prompts.parquet")
    chosen = [
        {"prompt_id": r["prompt_id"], "selected": i % 2 == 0, "status": "ok", "reason": ""}
        for i, r in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(chosen, schema=SELECTION), directory / "selection.parquet")
    return directory / "prompts.parquet", directory / "selection.parquet"


SMALL = Training(
    steps=6, prompts_per_step=4, sampling=Sampling(samples=8, max_new_tokens=2), learning_rate=1e-2
)


CPU = Runtime(device="cpu", threads=1, train_micro_batch=32, save_steps=2)


def arguments_of(workspace: Path, name: str) -> dict[str, Any]:
    """Return the arguments of a stage into ``workspace/name``, except its reporting callback."""
    target = workspace / name
    target.mkdir(exist_ok=True)
    return {
        "files": StageFiles(
            policy=workspace / "policy",
            prompts=workspace / "prompts.parquet",
            selection=workspace / "selection.parquet",
            out=target / "checkpoint",
            metrics=target / "metrics.parquet",
            scratch=target / ".scratch",
        ),
        "training": SMALL,
        "objective": Objective(),
        "grading": Grading(),
        "dtype": "float32",
        "seed": 3,
        "runtime": CPU,
    }


def run(workspace: Path, name: str = "run", **changes: Any) -> tuple[dict[str, Any], Path]:
    """Train one stage into ``workspace/name``; a change is of an argument, or of one of its files."""
    arguments = {**arguments_of(workspace, name), "report": lambda progress: None}
    paths = {field.name for field in fields(StageFiles)}
    arguments["files"] = replace(arguments["files"], **{k: v for k, v in changes.items() if k in paths})
    return train(**(arguments | {k: v for k, v in changes.items() if k not in paths})), workspace / name


def loss_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    training: Training,
    objective: Objective,
    dtype: str = "float32",
) -> StageTrainer:
    """Build TRL's trainer as a stage does, for calls of its loss; it has no prompts that can be sampled."""
    arguments = trainer_arguments(training, objective, dtype, 0, CPU, directory, 1000)
    arguments.loss_type = objective.loss_type  # a stage uses dapo for bnpo, which is equal over a whole step
    rows = [{"prompt_id": str(i)} for i in range(training.prompts_per_step)]
    with Verifier() as verifier:
        built = Stage(tokenizer, Draws(rows, training, 0), verifier, training, 0, 8)
        trainer = build_trainer(model, tokenizer, arguments, built, Watch(training, silent), None)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rows_of(target: Path) -> list[dict[str, Any]]:
    return pq.read_table(target / "metrics.parquet").to_pylist()


def digest(target: Path) -> dict[str, str]:
    return {
        path.relative_to(target).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
