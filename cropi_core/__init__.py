"""CROPI as a library: influence features, scores, selection, training and artifacts, without an orchestrator."""

import os

# Idle OpenMP threads spin by default and starve whatever else runs: on two busy cores a training step was measured
# at 9.9 s spinning and 1.1 s waiting, on idle ones there is no difference. It counts only before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
