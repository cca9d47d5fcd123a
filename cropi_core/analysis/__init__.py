"""Analysis of selected prompts: comparisons with the pool, with the validation sets and between stages.

    from cropi_core.analysis import read_chosen

    found = read_chosen(Store(".cropi"), "demo-0123abcd")
    found.stages[0].figures["entropy"].selected_mean   # .pool_mean; .low to .high of a random subset
    [verdict.sentence for verdict in found.verdicts]

Pure functions on arrays: :mod:`~cropi_core.analysis.contrast` (means, random subsets, changes),
:mod:`~cropi_core.analysis.likeness` (cosines), :mod:`~cropi_core.analysis.findings` (the paper's findings).
:mod:`~cropi_core.analysis.sentences` embeds texts; :mod:`~cropi_core.analysis.reading` reads a run's artifacts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
