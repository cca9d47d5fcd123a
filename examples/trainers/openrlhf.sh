#!/bin/sh
# OpenRLHF as the training step of a curriculum: training.engine: command, format: openrlhf,
# run: [sh, examples/trainers/openrlhf.sh].
#
# Options are those of OpenRLHF 0.10.2, which renamed all of them (its documentation, "Flag migration"). Not run with
# OpenRLHF here; a test runs this script with a recorder in its place. Set BATCH, SAMPLES, GPUS, TOKENS and REWARD.
#
# * REWARD is a file with reward_func(queries, prompts, labels), or the URL of a server.
# * OpenRLHF counts passes over the prompts, not steps: EPISODES is steps x batch / selected prompts, rounded up. Set it
#   and training.steps alike.
# * load_enable resumes an interrupted stage from the checkpoints in ckpt.path.
set -eu
: "${REWARD:?Python file with reward_func, or a URL}"
python -m openrlhf.cli.train_ppo_ray \
  --actor.model_name_or_path "$CROPI_POLICY" \
  --actor.num_nodes 1 --actor.num_gpus_per_node "${GPUS:-1}" \
  --ref.num_nodes 1 --ref.num_gpus_per_node "${GPUS:-1}" \
  --train.colocate_all --vllm.num_engines "${GPUS:-1}" --vllm.enable_sleep --ds.enable_sleep \
  --vllm.gpu_memory_utilization 0.5 \
  --reward.remote_url "$REWARD" \
  --data.prompt_dataset "$CROPI_PROMPTS" \
  --data.input_key input --data.label_key label --data.apply_chat_template \
  --algo.advantage.estimator group_norm \
  --rollout.n_samples_per_prompt "${SAMPLES:-8}" \
  --rollout.batch_size "${BATCH:-16}" \
  --rollout.max_new_tokens "${TOKENS:-1024}" \
  --train.batch_size "$((${BATCH:-16} * ${SAMPLES:-8}))" \
  --train.num_episodes "${EPISODES:-1}" --train.seed "$CROPI_SEED" \
  --ckpt.path "$CROPI_WORK" --ckpt.save_steps "${SAVE_EVERY:-10}" --ckpt.load_enable \
  --ckpt.output_dir "$CROPI_OUT"
