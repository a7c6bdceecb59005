"""Promise 12: every fault of the list has a test, and what a person gets to read is one line that helps."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import torch

from mhmoe_vl import commands
from mhmoe_vl.train import checkpoint

from .harness import TESTS, Found, error_line, fork, wait
from .runs import pretrain, world, write_run

TITLE = "messages, and a test for every fault"

FAULTS = {
    # shards
    "D1": "faults/damaged_shards data/test_tar:test_every_cut_is_noticed",
    "D2": "faults/damaged_shards",
    "D3": "data/test_transforms:test_damaged_and_foreign_files_are_bad_samples faults/damaged_shards",
    "D4": "data/test_shards:test_incomplete_samples_name_shard_and_key",
    "D5": "data/test_shards:test_streaming_goes_on_with_the_next_shard data/test_tar:test_other_files_are_refused",
    "D6": "faults/bombs data/test_transforms:test_size_is_checked_before_decoding",
    "D7": "faults/foreign_code data/test_transforms:test_damaged_and_foreign_files_are_bad_samples",
    "D8": "data/test_transforms:test_colour_modes_give_the_right_colours",
    "D9": "faults/bombs data/test_tar:test_a_text_member_over_64_kb_is_left_out_unread",
    "D10": "faults/foreign_code data/test_shards:test_other_members_are_never_opened",
    "D11": "faults/foreign_code data/test_shards:test_other_protocols_are_refused",
    "D12": "faults/foreign_code data/test_tar:test_split_name",
    "D13": "data/test_shards:test_a_key_that_comes_back_is_counted_as_duplicate",
    "D14": "faults/bombs data/test_tar:test_a_declared_size_is_not_believed",
    "D15": "faults/remote_shards data/test_remote:test_failures_that_stay_are_bad_samples",
    "D16": "data/test_loader:test_a_set_smaller_than_a_batch_comes_round faults/exactly_once",
    "D17": "data/test_writing:test_a_killed_packer_is_finished_by_running_it_again",
    "D18": "train/test_engine:test_bad_samples_are_counted_and_too_many_stop_the_run",
    # annotations
    "A1": "data/test_records:test_what_is_not_strict_json_is_refused_with_its_place",
    "A2": "data/test_records:test_a_value_that_is_not_as_described_is_refused",
    "A3": "data/test_annotated:test_a_missing_picture_is_a_bad_sample_and_refused_in_evaluation",
    "A4": "data/test_vqa_files:test_what_is_wrong_is_named_with_its_place",
    "A7": "data/test_vqa_files:test_a_test_split_has_no_answers data/test_vqa_files:test_any_number_of_answers_is_kept",
    "A8": "data/test_nlvr2_files:test_left_and_right_exchanged_by_links_are_refused",
    "A9": "data/test_caption_files:test_any_number_of_captions_of_any_length",
    "A11": "commands/test_score:test_check_lists_each_kind_of_mistake_on_a_line",
    # configurations
    "C1": "test_config:test_what_is_wrong_is_said_in_one_line",
    "C2": "test_config:test_yaml_reads_scientific_numbers_and_refuses_words_as_booleans faults/foreign_code",
    "C3": "test_pretrain:test_bad_input_gets_one_line_and_exit_code_2",
    "C4": "train/test_resume:test_changes_that_make_another_run_are_refused",
    "C5": "train/test_system:test_a_run_folder_that_cannot_be_made_is_named faults/full_disk",
    "C6": "faults/test_small_faults:test_secrets_of_the_environment_are_nowhere",
    # checkpoints
    "K1": "train/test_checkpoint:test_damage_is_found_and_the_one_before_is_taken faults/bit_rot",
    "K2": "faults/foreign_code faults/bombs",
    "K3": "train/test_checkpoint:test_weights_that_do_not_fit_are_named_with_both_shapes",
    "K4": "faults/old_files",
    "K5": "faults/kills faults/full_disk train/test_checkpoint:test_a_save_killed_at_any_moment_leaves_a_whole_one",
    "K6": "train/test_distributed:test_rank_0_speaks_for_all",
    "K7": "train/test_checkpoint:test_checksums_cannot_point_outside faults/bombs",
    "K8": "train/test_checkpoint:test_last_becomes_previous_and_names_stay",
    "K9": "train/test_engine:test_a_stopped_run_goes_on_bit_for_bit faults/kills",
    # training
    "T1": "faults/not_a_number",
    "T2": "train/test_alarms:test_a_loss_over_ten_times_the_median_is_told",
    "T3": "faults/test_small_faults:test_memory_that_ends_is_one_line_and_the_checkpoint_stands",
    "T4": "faults/kills train/test_system:test_the_first_signal_is_noted_and_the_second_is_left_to_the_system",
    "T5": "faults/kills",
    "T6": "faults/lost_processes data/test_loader:test_a_dead_worker_is_named",
    "T7": "faults/lost_processes",
    "T8": "train/test_engine:test_ranks_with_different_configurations_are_refused",
    "T9": "faults/exactly_once train/test_engine:test_two_ranks_stop_skip_and_go_on_together",
    "T10": "faults/lost_processes train/test_step:test_a_step_without_any_sample_is_left_out",
    "T11": "faults/test_small_faults:test_training_goes_on_without_a_console",
    "T12": "faults/test_small_faults:test_files_and_memory_do_not_grow_with_the_steps",
    "T13": "nn/test_router:test_extreme_logits_stay_finite faults/not_a_number",
    # routing
    "R1": "faults/routing faults/not_a_number",
    "R2": "faults/routing nn/test_router:test_no_ties_at_the_start",
    "R3": "faults/routing nn/test_sparse_layers:test_sample_alone_equals_sample_in_batch",
    "R4": "faults/routing nn/test_sparse_layers:test_nothing_to_route",
    "R5": "nn/test_balancing:test_router_learns_from_the_task_with_one_choice",
    "R6": "nn/test_balancing:test_balance_loss_is_one_when_even_and_num_experts_when_collapsed faults/routing",
    "R7": "nn/test_router:test_autocast_changes_nothing",
    "R8": "nn/test_multiway:test_every_pool_answers_even_without_rows faults/lost_processes",
}
"""Tests by the fault's number: ``folder/file:function``, or the file of a promise."""


def _missing() -> list[str]:
    """Tests of the table that do not exist."""
    functions: dict[str, set[str]] = {}
    missing = []
    for fault, tests in FAULTS.items():
        for test in tests.split():
            name, _, function = test.partition(":")
            path = TESTS / f"{name}.py"
            if name not in functions:
                tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
                functions[name] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            if (function or "check") not in functions[name]:
                missing.append(f"{fault}: {test} does not exist")
    return missing


# -------------------------------------------------------------------------------------------- mistakes
def _written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _mistakes(folder: Path) -> dict[str, Callable[[], int]]:
    """Commands that must end in one error line."""
    good = write_run(folder, "good", steps=1)
    bad_name = folder / "a\x1b]0;title\x07.tar"
    long_name = folder / ("x" * 200 + ".tar")
    cut = _written(folder, "cut.json", b'{"annotations": [')
    newer = checkpoint.save(folder / "newer/checkpoints", {"model": {"w": torch.ones(2)}}, {"step": 1, "format": 9}, "")
    pickle = _written(folder, "w.pth", b"\x80\x02cos\nsystem\n.")
    data = lambda *arguments: lambda: commands.main([*map(str, arguments)])  # noqa: E731
    train = lambda *arguments: lambda: pretrain("--config", good, *arguments)  # noqa: E731
    return {
        "no shard": data("check-data", folder / "none.tar"),
        "no folder": data("make-manifest", folder / "none"),
        "pipe": data("check-data", "pipe:cat x"),
        "control characters": data("check-data", bad_name),
        "long name": data("check-data", long_name),
        "surrogates": data("check-data", "\udcff.tar"),
        "no run": data("check-checkpoint", folder / "none"),
        "pickle": data("convert-checkpoint", pickle),
        "no file": data("convert-checkpoint", folder / "none.pth"),
        "cut annotations": data("score", "vqa", "--predictions", cut, "--annotations", cut),
        "no annotations": data("score", "captions", "--predictions", folder / "x", "--annotations", folder / "y"),
        "unknown command": data("chek-data"),
        "no command": data(),
        "unknown option": data("check-data", "--jsn", "x"),
        "no config": lambda: pretrain("--config", folder / "none.yaml"),
        "binary config": lambda: pretrain("--config", _written(folder, "b.yaml", bytes(range(256)))),
        "tag": lambda: pretrain("--config", _written(folder, "t.yaml", b"seed: !!python/name:os.system\n")),
        "twice": lambda: pretrain("--config", _written(folder, "d.yaml", b"seed: 1\nseed: 2\n")),
        "unknown key": train("--task.imags", "x"),
        "escape in a value": train("--task.data_dir", "\x1b]0;title\x07"),
        "long value": train("--task.data_dir", "y" * 3000),
        "nested value": train("--seed", "[" * 50_000),
        "number of 9,000 digits": train("--seed", "9" * 9000),
        "not a number": train("--optim.lr", ".nan"),
        "no batch": train("--task.images.batch_size", "0"),
        "heads": train("--encoder.num_heads", "5"),
        "top_k": train("--encoder.ffn.top_k", "99"),
        "no device": train("--train.device", "cuda:77"),
        "output is a file": train("--output_dir", good),
        "no right to write": train("--output_dir", "/proc/x/run"),
        "eval of nothing": lambda: pretrain("--eval", folder / "none"),
        "newer checkpoint": train("--train.resume", newer, "--output_dir", folder / "fresh"),
        "init from nothing": train("--init_from", folder / "none"),
    }


def check(folder: Path, full: bool) -> Found:
    world(folder)
    found = Found("", _missing())
    longest = 0
    mistakes = _mistakes(folder)
    chosen = mistakes if full else dict(list(mistakes.items())[::2])
    for name, action in chosen.items():
        said = folder / "said.txt"
        said.unlink(missing_ok=True)
        code = wait(fork(action, said), 60)
        text = re.sub(r"^warning: .*\n", "", said.read_text(), flags=re.M)
        lines = text.rstrip("\n").split("\n")
        longest = max(longest, max(map(len, lines)))
        problem = error_line(text)
        if code != 2 or problem:
            found.failures.append(f"{name}: exit code {code}, {problem}")
    found.figure = (
        f"{len(FAULTS)} faults of the list, each with a test; {len(chosen)} mistakes: one line each of at most"
        f" {longest} characters, exit code 2, control characters as text"
    )
    if found.failures:
        found.figure = f"{len(found.failures)} faults without a test or mistakes without a proper line"
    found.numbers = {"faults": len(FAULTS), "mistakes": len(chosen), "longest": longest}
    return found
