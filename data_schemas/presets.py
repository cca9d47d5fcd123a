r"""Presets of table sources: the column names of known datasets and formats.

    pool: {kind: hub, preset: gsm8k}
    pool: {kind: file, preset: verl, path: train.parquet}

A preset fills in fields of a table source that the configuration leaves out; fields that the configuration sets take
precedence. Results and keys depend on the resulting fields, not on the preset's name.

References, read in 2026-11:
    gsm8k: hub ``openai/gsm8k``; its solutions end in ``#### answer``. Cobbe et al., arXiv 2110.14168. MIT.
    math: Hendrycks et al., arXiv 2103.03874: 7,500 and 5,000 rows, the answer in the solution's last ``\boxed{}``; hub
        ``DigitalLearningGmbH/MATH-lighteval`` has all subjects in one table. MIT (repository ``hendrycks/math``).
    math_500: the 500 test problems of Lightman et al., arXiv 2305.20050; hub ``HuggingFaceH4/MATH-500``.
    deepscaler: hub ``agentica-org/DeepScaleR-Preview-Dataset``, 40,315 rows, a few without an answer (its
        discussion 4). MIT.
    dapo_17k: hub ``open-r1/DAPO-Math-17k-Processed``, the distinct prompts of ``BytedTsinghua-SIA/DAPO-Math-17k``
        (Yu et al., arXiv 2503.14476; Apache-2.0), which repeats each about 100 times. The mapping fits both.
    verl: ``docs/preparation/prepare_data.rst`` of ``volcengine/verl``: data_source, prompt, ability, reward_model,
        extra_info.
    openrlhf: ``openrlhf/datasets/prompts_dataset.py`` of ``OpenRLHF/OpenRLHF``: ``--input_key`` (default ``input``),
        ``--label_key``, ``datasource``.
    trl: ``docs/source/dataset_formats.md`` of ``huggingface/trl``, prompt-only; its GRPO examples call the answer
        ``solution``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PresetName = Literal["gsm8k", "math", "math_500", "deepscaler", "dapo_17k", "verl", "openrlhf", "trl"]


@dataclass(frozen=True)
class Preset:
    """A preset of a table source.

    Attributes:
        description: A short description.
        columns: Fields of ``columns``.
        source_fields: Other fields of the table source, for files and hub datasets.
        hub: Fields for ``kind: hub`` only: id, subset, split; empty for a format that is not a dataset.
        licence: The licence that the dataset's publisher states; empty if it depends on the dataset.
    """

    description: str
    columns: Mapping[str, Any]
    source_fields: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""


PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(
        description="GSM8K, grade-school word problems",
        columns={"prompt": "question", "answer": "answer"},
        source_fields={"answer_pattern": r"####\s*(.+)", "verifier": "math", "source": "gsm8k"},
        hub={"path": "openai/gsm8k", "subset": "main"},
        licence="MIT",
    ),
    "math": Preset(
        description="MATH (Hendrycks), competition problems with levels 1 to 5",
        columns={"prompt": "problem", "answer": "solution", "level": "level"},
        source_fields={"answer_pattern": "boxed", "verifier": "math", "source": "math", "unanswered": "drop"},
        hub={"path": "DigitalLearningGmbH/MATH-lighteval"},
        licence="MIT",
    ),
    "math_500": Preset(
        description="MATH-500, the 500 test problems of *Let's Verify Step by Step*",
        columns={"prompt": "problem", "answer": "answer", "level": "level"},
        source_fields={"verifier": "math", "source": "math_500"},
        hub={"path": "HuggingFaceH4/MATH-500", "split": "test"},
    ),
    "deepscaler": Preset(
        description="DeepScaleR preview, AIME, AMC, Omni-MATH and STILL problems",
        columns={"prompt": "problem", "answer": "answer"},
        source_fields={"verifier": "math", "source": "deepscaler", "unanswered": "drop"},
        hub={"path": "agentica-org/DeepScaleR-Preview-Dataset"},
        licence="MIT",
    ),
    "dapo_17k": Preset(
        description="DAPO-Math-17k, each prompt once; English (`subset: all` has the Chinese ones too)",
        columns={"prompt": "prompt", "answer": "reward_model.ground_truth"},
        source_fields={"verifier": "math", "source": "dapo_17k"},
        hub={"path": "open-r1/DAPO-Math-17k-Processed", "subset": "en"},
        licence="Apache-2.0",
    ),
    "verl": Preset(
        description="verl's Parquet files",
        columns={
            "prompt": "prompt",
            "answer": "reward_model.ground_truth",
            "source": "data_source",
            "tags": ("extra_info.index",),
        },
    ),
    "openrlhf": Preset(
        description="OpenRLHF's prompts, strings or messages",
        columns={"prompt": ("input", "context_messages", "prompt"), "answer": ("label", "answer")},
    ),
    "trl": Preset(
        description="TRL's prompt-only format, standard or conversational, with an answer",
        columns={"prompt": "prompt", "answer": ("solution", "answer", "ground_truth")},
    ),
}


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the preset's fields that a table source leaves out; an unknown preset changes nothing.

    With a user-defined path, the preset's subset is dropped, because it belongs to the preset's hub dataset.
    """
    preset = PRESETS.get(str(given.get("preset")))
    if preset is None:
        return dict(given)
    hub = dict(preset.hub) if given.get("kind") == "hub" else {}
    if "path" in given:
        hub.pop("subset", None)
    columns = given.get("columns", {})
    if isinstance(columns, Mapping):
        columns = {**preset.columns, **columns}
    return {**preset.source_fields, **hub, **given, "columns": columns}
