"""How many times sooner CROPI comes to the accuracy that the full pool has at its end: the figures of a study.

    cropi study acceleration --root /data/study --write docs/background/evidence/acceleration.md  # hours, in parts
    python benchmarks/acceleration.py --root /data/study     # seconds

Runs nothing: it compares what is finished of ``configs/studies/acceleration.yaml`` under the root, and writes
``benchmarks/results/acceleration.json`` with the figures and the machine. The peer of every ratio, training on the
full pool, is an arm of the same study.
"""

from finished_study import finished_study

from cropi_core.study.compare import compare, headline


def main() -> None:
    """Compare and write."""
    done = finished_study(__doc__, "acceleration")
    done.write(headline(done.study, compare(done.study, done.curves)))


if __name__ == "__main__":
    main()
