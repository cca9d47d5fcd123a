"""What was selected: the chosen prompts of every stage beside their pool, their validation sets and one another.

    from cropi_core.chosen import read_chosen

    found = read_chosen(Store(".cropi"), "demo-0123abcd")
    found.stages[0].figures["entropy"].chosen        # beside .pool, and .low to .high of a random subset
    [verdict.sentence for verdict in found.verdicts]

Mathematics, numbers in and numbers out: :mod:`~cropi_core.chosen.contrast` (means, chance, change),
:mod:`~cropi_core.chosen.likeness` (cosines), :mod:`~cropi_core.chosen.findings` (the paper's findings).
:mod:`~cropi_core.chosen.sentences` embeds texts; :mod:`~cropi_core.chosen.reading` reads a run's artifacts.
"""

from cropi_core.chosen.contrast import Change, Contrast, change, contrast, level_numbers
from cropi_core.chosen.findings import Verdict
from cropi_core.chosen.likeness import redundancy, similarity
from cropi_core.chosen.reading import RunChosen, StageChosen, read_chosen
from cropi_core.chosen.sentences import Embed, load_embedder

__all__ = [
    "Change",
    "Contrast",
    "Embed",
    "RunChosen",
    "StageChosen",
    "Verdict",
    "change",
    "contrast",
    "level_numbers",
    "load_embedder",
    "read_chosen",
    "redundancy",
    "similarity",
]
