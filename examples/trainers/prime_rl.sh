#!/bin/sh
# prime-rl as the training step of a curriculum: training.engine: command, format: verifiers,
# run: [sh, examples/trainers/prime_rl.sh].
#
# Options are those of prime-rl since d135ed4 (July 2026), which renamed its environments to sources (its pages
# Configuration and Training). Not run with prime-rl here; a test runs this script with a recorder in its place. PRIME_RL is the
# checkout of prime-rl, with its environment; CONFIG adds your own settings to prime_rl.toml.
#
# * --ckpt writes the weights of the last step, which prime-rl does not do by default.
# * An interrupted stage resumes from its newest checkpoint.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
cd "${PRIME_RL:?directory of a prime-rl checkout}"
uv pip install "$CROPI_PROMPTS_DIRECTORY"
resume=
if [ -n "$(find "$CROPI_WORK" -path '*/checkpoints/step_*' -prune -print | head -n 1)" ]; then
  resume="--ckpt.resume-step -1"
fi
# shellcheck disable=SC2086 # two words
uv run --no-sync rl @ "$here/prime_rl.toml" ${CONFIG:+@ "$CONFIG"} \
  --model.name "$CROPI_POLICY" \
  --max-steps "$CROPI_STEPS" \
  --output-dir "$CROPI_WORK" \
  --ckpt --ckpt.interval "${SAVE_EVERY:-10}" $resume

weights=$(find "$CROPI_WORK" -type d -path "*/weights/step_$CROPI_STEPS" | head -n 1)
cp -R "${weights:?prime-rl left no weights of the last step}/." "$CROPI_OUT"
