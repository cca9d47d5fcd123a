"""Everything that a run imports, for the process that the cases of campaigns are forked from."""

import zarr

import cropi_core.evaluation.accuracy
import cropi_core.gradients.extract
import cropi_core.rollouts.collect
import cropi_core.rollouts.samplers
import cropi_core.scores.influence
import cropi_core.selection.strategies
import cropi_core.training.stage
import cropi_core.world.base_policy
import tests.campaigns.roots
import tests.support.commands
import tests.support.killed

__all__ = ["cropi_core", "tests", "zarr"]
