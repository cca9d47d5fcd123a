"""Sixteen mistakes that code of this kind has made in silence, and the tests that fail if one comes back."""

import ast

import pytest

from tests.support.paths import TESTS

MISTAKES = {
    "1. The random coordinates of a projection come from the first part of the model only": [
        "cropi_core/gradients/test_projection.py::test_every_layer_is_covered_in_proportion",
        "cropi_core/gradients/test_projection.py::test_self_test_passes_and_refuses",
    ],
    "2. Prompts are tokenised without the chat template they were sampled with, completions a second time": [
        "cropi_core/rollouts/test_rollouts.py::test_tokens_in_tokens_out",
        "cropi_core/training/test_training.py::test_the_model_is_trained_on_the_token_ids_that_render_gives",
    ],
    "3. Padding counts as an end token, so a row depends on its batch; truncated completions are said to end": [
        "cropi_core/gradients/test_objective.py::test_padding_has_no_weight_for_any_content",
        "cropi_core/gradients/test_features.py::test_neighbours_and_order_do_not_enter_a_row",
        "cropi_core/rollouts/test_rollouts.py::test_tokens_in_tokens_out",
        "cropi_core/rollouts/test_rollouts.py::test_a_completion_does_not_depend_on_its_batch",
    ],
    "4. Importance ratios are computed at another temperature than that of the samples": [
        "cropi_core/gradients/test_features.py::test_temperature_is_that_of_the_rollouts",
        "cropi_core/rollouts/test_rollouts.py::test_logprobs_are_of_the_distribution_sampled_from",
        "cropi_core/gradients/test_objective.py::test_on_policy_every_ratio_is_one",
    ],
    "5. Means of micro-batches are summed: length and the number of micro-batches change weight and norm": [
        "cropi_core/gradients/test_features.py::test_any_micro_batch_split_gives_the_same_rows",
        "cropi_core/gradients/test_objective.py::test_a_long_completion_weighs_by_the_loss_type_alone",
        "cropi_core/training/test_training.py::test_the_gradient_of_a_step_does_not_depend_on_the_micro_batch",
    ],
    "6. The loss that scores is not the loss that trains": [
        "cropi_core/gradients/test_features.py::test_every_objective_is_its_surrogate",
        "cropi_core/gradients/test_objective.py::test_advantages_are_those_of_the_trainer",
        "cropi_core/gradients/test_objective.py::test_clip_stops_only_what_ppo_stops",
    ],
    "7. Offsets wrap at 32 bits; a projection depends on the machine that computes it": [
        "cropi_core/gradients/test_gradient_store.py::test_rows_beyond_two_to_the_32_elements_are_distinct",
        "cropi_core/gradients/test_projection.py::test_counter_is_splitmix64_past_32_bits",
        "cropi_core/gradients/test_projection.py::test_known_answer",
    ],
    "8. Casts to half precision lose most of a small gradient": [
        "cropi_core/gradients/test_gradient_store.py::test_half_precision_loses_less_than_a_thousandth_at_any_norm",
        "cropi_core/training/test_training.py::test_bfloat16_keeps_updates_smaller_than_its_spacing",
    ],
    "9. A prompt whose rewards are equal costs a forward and a backward, and can never return": [
        "cropi_core/gradients/test_features.py::test_dead_prompts_are_skipped_with_a_reason",
        "e2e/test_strategies.py::test_a_prompt_without_a_gradient_can_return_when_the_policy_has_changed",
    ],
    "10. Log-probabilities of a reference are computed and not used, those of the behaviour every round": [
        "e2e/test_strategies.py::test_later_stages_read_the_stored_behaviour_in_one_forward_a_batch",
    ],
    "11. Rows are found by the text of a prompt, or by place": [
        "cropi_core/selection/test_selection.py::test_rows_are_matched_by_id_and_not_by_place",
        "cropi_core/gradients/test_gradient_store.py::test_prompts_are_keyed_by_unique_ids",
        "cropi_core/scores/test_influence.py::test_the_order_of_the_rows_changes_nothing",
        "cropi_core/prompts/test_prompts.py::test_explicit_duplicate_ids_are_named",
    ],
    "12. The shard of a failed worker is left out and selection goes on over the rest": [
        "e2e/test_strategies.py::test_a_dead_worker_is_replaced_once_and_then_an_error",
        "cropi_core/gradients/test_gradient_store.py::test_missing_shards_are_an_error_that_names_them",
        "cropi_core/scores/test_influence.py::test_an_unfinished_store_is_not_scored",
        "cropi_core/selection/test_selection.py::test_a_prompt_that_was_never_sampled_is_not_passed_over",
    ],
    "13. The key of a cache leaves out what changes its content; resuming rewrites the only copy": [
        "cropi_core/artifacts/test_store.py::test_a_key_changes_with_any_setting_and_any_input_digest",
        "cropi_core/artifacts/test_store.py::test_publishing_never_overwrites",
        "e2e/test_rerun.py::test_a_changed_setting_computes_its_step_and_what_follows_and_nothing_before",
        "e2e/test_stops.py::test_files_complete_at_a_kill_are_not_written_again",
        "e2e/test_stops.py::test_after_all_kills_every_artifact_is_that_of_the_undisturbed_run",
    ],
    "14. An exception of the verifier becomes reward 0": [
        "cropi_core/rewards/test_verifiers.py::test_a_hostile_item_affects_only_itself",
        "cropi_core/rewards/test_verifiers.py::test_sympy_bombs_are_not_gradable_and_their_neighbours_are",
        "cropi_core/training/test_training.py::test_completions_that_cannot_be_graded_teach_nothing_and_are_counted",
        "cropi_core/selection/test_selection.py::test_pass_rates_are_means_over_what_was_graded",
    ],
    "15. What chooses the data also measures the result: sets overlap": [
        "cropi_core/prompts/test_prompts.py::test_sets_that_share_a_prompt_are_named_with_its_ids",
        "e2e/test_bad_input.py::test_a_set_that_shares_prompts_with_the_pool_is_named_with_them",
        "cropi_core/world/test_world.py::test_splits_are_disjoint_whatever_the_seeds",
    ],
    "16. The name of a strategy is accepted and means something else": [
        "cropi_core/selection/test_selection.py::test_unknown_strategies_are_errors",
        "cropi_core/selection/test_selection.py::test_a_strategy_without_its_evidence_is_an_error_and_not_random",
        "data_schemas/test_config.py::test_an_unknown_strategy_is_refused",
        "e2e/test_strategies.py::test_a_stage_trains_on_exactly_what_its_strategy_selects",
    ],
}


def defined_in(path):
    """The test functions a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_has_tests_that_exist(mistake):
    for node in MISTAKES[mistake]:
        file, _, name = node.partition("::")
        assert name in defined_in(TESTS / file), f"tests/{node} is gone: what fails now if this comes back?"


def test_no_mistake_is_left_out():
    assert [int(mistake.partition(".")[0]) for mistake in MISTAKES] == list(range(1, 17))
