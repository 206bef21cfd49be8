"""Planted faults in what keeps a run, and in what chooses for it: store, shards, surveys; see `test_mutations`."""

import inspect

import pytest
import test_checkpoint
import test_columns
import test_crash
import test_executors
import test_gradients
import test_hostile
import test_row_weights
import test_runs
import test_streaming
import test_survey
from runs import flip
from test_mutations import CAUGHT, Fault, planted

from convexprune._layerwise import allocation
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.steps import survey
from convexprune._runs import executors
from convexprune._storage import failures, files
from convexprune._storage.batches import Batches
from convexprune.adapters import _gradients as gradients
from convexprune.adapters._checkpoints import reading, shards
from convexprune.adapters._checkpoints.shards import Shards
from convexprune.adapters._loading import loading
from convexprune.pruners._search import AbstractSearch

llama, folder, small, spoilt = test_streaming.llama, test_checkpoint.folder, test_crash.small, test_hostile.folder
"""Fixtures of these modules."""

FAULTS = (
    Fault("a damaged layer that is taken as it is", FolderStore.discard_damaged, '!= notes["sha256"]', "is None",
          test_runs.test_damaged_files_are_found_and_done_again, {"file": "layers/00000.safetensors", "damage": flip}),
    Fault("damaged hidden states that are taken as they are", Batches.kept,
          'sha256(path) != notes["sha256"]', "False", test_runs.test_damaged_files_are_found_and_done_again,
          {"file": "hidden/00002.dense.bin", "damage": flip}),
    Fault("layers that are not looked at before the end", FolderStore.require_whole, "self.discard_damaged()", "pass",
          test_runs.test_a_disk_that_does_not_keep_what_it_is_given_is_found),
    Fault("an agreement with oneself alone", FolderStore.compute_once, "return value", "return make()",
          test_runs.test_what_the_first_process_has_made_is_what_all_agree_on),
    Fault("a file that is named before it is flushed", files.publish, "_sync(temporary)", "pass",
          test_crash.test_after_a_power_cut_the_run_goes_on, {"mode": "serial"}),
    Fault("a failing disk that is Python's error", failures._as_output_error, "raise _DiskError(", "raise OSError(",
          test_crash.test_an_operation_that_fails_is_one_clear_error_and_the_run_goes_on,
          {"mode": "serial", "step": 6}),
    # Executors.
    Fault("layers that nobody hears of", executors._Watch.all_finished, "self._on_operator(report)", "pass",
          test_crash.test_a_pool_that_loses_a_worker_tells_of_every_operator),
    Fault("a pool that gives up at once", executors.Pool.run, "RETRIES * len(self.devices)", "0",
          test_crash.test_a_pool_that_loses_a_worker_tells_of_every_operator),
    Fault("what a worker raises is lost", executors._do_and_send, "pipe.send(error)", "pass",
          test_crash.test_what_a_worker_raises_is_what_the_pool_raises),
    Fault("a worker of another installation", executors.Job.do,
          "differences(dict(self.installed), installation(device))", "[]",
          test_executors.test_a_job_of_another_installation_is_refused_before_its_model_is_opened),
    Fault("workers that hear Ctrl-C", executors._no_interrupts, "{signal.SIGINT}", "()",
          test_executors.test_a_worker_ends_with_its_parent_at_once_and_leaves_ctrl_c_to_it),
    # Checkpoints.
    Fault("weights that are made up", loading.read_model, 'if info["missing_keys"]', "if False",
          test_checkpoint.test_tensors_that_the_checkpoint_lacks_are_not_made_up),
    Fault("a tokenizer that is made up", reading.read_tokenizer, "return None", "pass",
          test_checkpoint.test_a_folder_without_a_tokenizer_has_none),
    Fault("a dtype that is not kept", loading.read_model, 'dtype or "auto"', "dtype or torch.float32",
          test_checkpoint.test_the_embedded_model_loads_in_its_own_precision_or_the_one_asked_for),
    Fault("a loaded model in its own dtype", loading._move, "dtype=dtype", "dtype=None",
          test_checkpoint.test_a_loaded_model_is_used_in_place),
    # Shards.
    Fault("layers that stay in memory", Shards.resident, "load_state_dict(away, assign=True)", "state_dict()",
          test_streaming.test_one_decoder_layer_at_a_time_is_in_memory),
    Fault("weights that may change meanwhile", Shards.require_unchanged,
          "require_unchanged(self._stamps if", "dict(self._stamps if",
          test_hostile.test_weights_that_change_while_the_result_is_written_make_no_model, {}, {"folder": "spoilt"}),
    Fault("another model in a worker", Shards.require_same, "!= origin.checksums.get(name)", "is None",
          test_hostile.test_a_worker_takes_the_same_weights_only, {"stream": True}, {"folder": "spoilt"}),
    Fault("names that have to have the prefix of the head", shards.stored_names,
          "(name, name.removeprefix(prefix), prefix + name)", "(name,)",
          test_streaming.test_a_checkpoint_without_the_prefix_of_the_head_keeps_its_names),
    # Surveys, gradients, and columns.
    Fault("columns chosen with the damping of the refit", AbstractSearch._posed, "self.damping is None", "False",
          test_columns.test_what_others_make_up_for_in_the_sample_alone_is_kept),
    Fault("columns that count by their gradient alone", gradients._Squares.add, ".mul_(x.float().flatten(0, -2))", "",
          test_gradients.test_what_an_operator_reads_counts_by_the_derivative_of_the_loss_by_its_size,
          {"name": "llama", "block": 1}),
    Fault("half of the way that is less", allocation.allocate_by_rule, "0.5 if rule", "0.4 if rule",
          test_survey.test_half_a_curve_is_half_of_the_way_and_its_gap_reaches_to_the_best),
    Fault("a gap from nowhere", allocation.allocate_by_rule, "found.cost - found.gap", "cost",
          test_survey.test_half_a_curve_is_half_of_the_way_and_its_gap_reaches_to_the_best),
    Fault("rows that count for nothing", allocation.row_weights, ".clamp_min(LEAST)", "",
          test_row_weights.test_the_weights_of_rows_are_half_of_the_way_and_never_nothing),
    Fault("an operator that is left out", survey.Survey.units, "in self._costs.items()",
          "in list(self._costs.items())[1:]",
          test_survey.test_costs_grow_with_the_zeros_and_nothing_is_written),
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_makes_its_test_fail(fault, request: pytest.FixtureRequest):
    names = inspect.signature(fault.test).parameters.keys() - fault.arguments.keys()
    fixtures = {name: request.getfixturevalue(fault.fixtures.get(name, name)) for name in sorted(names)}
    with planted(fault), pytest.raises(CAUGHT):
        fault.test(**fault.arguments, **fixtures)
