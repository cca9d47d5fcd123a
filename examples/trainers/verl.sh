#!/bin/sh
# verl as the training step of a curriculum: training.engine: command, format: verl, run: [sh, examples/trainers/verl.sh].
#
# Options are those of verl 0.9 (verl-project/verl, verl/trainer/config/ppo_trainer.yaml and reward/reward.yaml). Not run
# with verl here; a test runs this script with a recorder in its place. Set BATCH, SAMPLES, GPUS, TOKENS and REWARD.
#
# * save_freq: verl saves nothing by default. The last step is always saved if it is set.
# * val_files is opened in any case; nothing is validated here, cropi evaluates.
# * logger: the default would also report to W&B.
# * REWARD is a file with compute_score(data_source, solution_str, ground_truth, extra_info), by absolute path.
#   verl 0.8 and earlier read custom_reward_function.path.
# * An interrupted stage resumes: resume_mode is auto, and finds the checkpoints in default_local_dir.
set -eu
: "${REWARD:?absolute path of a Python file with compute_score}"
python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  data.train_files="$CROPI_PROMPTS" \
  data.val_files="$CROPI_PROMPTS" \
  data.train_batch_size="${BATCH:-16}" \
  data.max_response_length="${TOKENS:-1024}" \
  actor_rollout_ref.model.path="$CROPI_POLICY" \
  actor_rollout_ref.actor.ppo_mini_batch_size="${BATCH:-16}" \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n="${SAMPLES:-8}" \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  reward.custom_reward_function.path="$REWARD" \
  trainer.logger='["console"]' \
  trainer.nnodes=1 \
  trainer.n_gpus_per_node="${GPUS:-1}" \
  trainer.total_epochs="$CROPI_STEPS" \
  trainer.total_training_steps="$CROPI_STEPS" \
  trainer.save_freq="${SAVE_EVERY:-10}" \
  trainer.test_freq=-1 \
  trainer.val_before_train=False \
  trainer.default_local_dir="$CROPI_WORK"

step=$(cat "$CROPI_WORK/latest_checkpointed_iteration.txt")
python -m verl.model_merger merge --backend fsdp \
  --local_dir "$CROPI_WORK/global_step_$step/actor" \
  --target_dir "$CROPI_OUT"
