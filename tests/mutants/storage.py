"""Mutants of the checkpoint store: what counts as a checkpoint, which one is taken and kept, how one is committed."""

from __future__ import annotations

from .mutant import Mutant

VERIFIED, KEEP, SAVE, FORMAT, DISK = (
    f"storage/checkpoint/{name}.py" for name in ("verified", "keep", "save", "format", "disk")
)
KEPT = "unit/test_checkpoint_keep.py::"
COUNTS = KEPT + "test_a_checkpoint_counts_for_keep_only_if_its_hashes_are_right"
PRUNED = KEPT + "test_prune_keeps_the_newest_sound_ones_and_sets_damaged_ones_aside"
WHOLE = KEPT + "test_the_newest_is_the_newest_that_is_whole"
KILLED = KEPT + "test_a_killed_save_leaves_the_old_or_the_new_checkpoint"
FAULT = "unit/test_checkpoint.py::test_a_fault_is_named_and_nothing_is_changed"
LIFE = "runs/test_earlier_life.py::"
POWER = "chaos/test_chaos.py::test_a_sample_of_the_trials_holds[power]"
RANKS = "unit/test_checkpoint_verified.py::"

STORAGE = (
    Mutant(
        name="hashes_are_not_compared",
        bug="a checkpoint whose files have the right sizes is taken, whatever is in them",
        file=VERIFIED,
        before="    except (CheckpointError, OSError):\n        return True\n",
        after="    except (CheckpointError, OSError):\n        return False\n",
        test=COUNTS,
    ),
    Mutant(
        name="each_rank_hashes_the_first_files",
        bug="files are not dealt out to the ranks: those behind the first ones are read by nobody",
        file=VERIFIED,
        before="numbers = range(mesh.world.rank, len(names), mesh.world.size)",
        after="numbers = range(len(names) // mesh.world.size)",
        test=RANKS + "test_damage_that_one_rank_reads_is_known_to_all",
    ),
    Mutant(
        name="damage_counts_if_every_rank_reads_it",
        bug="a damaged file, which one rank reads, is taken for sound because the others have read none",
        file=VERIFIED,
        before="dist.all_reduce(bad, op=dist.ReduceOp.MIN",
        after="dist.all_reduce(bad, op=dist.ReduceOp.MAX",
        test=RANKS + "test_damage_that_one_rank_reads_is_known_to_all",
    ),
    Mutant(
        name="the_oldest_is_tried_first",
        bug="a run is resumed from its oldest checkpoint",
        file=VERIFIED,
        before="for step in reversed(found) if",
        after="for step in found if",
        test=RANKS + "test_the_newest_sound_one_is_taken_or_the_one_that_is_asked_for",
    ),
    Mutant(
        name="the_best_is_not_taken_first",
        bug="the checkpoint that is asked for, the best one, comes only in its turn",
        file=VERIFIED,
        before="iter([*(step for step in first if step in found), *(step for step in reversed(found)",
        after="iter([*(), *(step for step in reversed(found)",
        test=RANKS + "test_the_newest_sound_one_is_taken_or_the_one_that_is_asked_for",
    ),
    Mutant(
        name="damaged_checkpoints_count_for_keep",
        bug="a damaged checkpoint takes the place of a sound one, which is deleted",
        file=VERIFIED,
        before="            verified.add(step)\n            kept += 1\n",
        after="            verified.add(step)\n        kept += 1\n        if not why:\n            pass\n",
        test=COUNTS,
    ),
    Mutant(
        name="one_checkpoint_less_is_kept",
        bug="an off-by-one: of checkpoint.keep = 2 one is left",
        file=VERIFIED,
        before="while kept < keep and (step",
        after="while kept < keep - 1 and (step",
        test=PRUNED,
    ),
    Mutant(
        name="the_best_checkpoint_is_pruned",
        bug="the best checkpoint is deleted when enough newer ones are there",
        file=VERIFIED,
        before="for step in (step for step in order if step not in marked):",
        after="for step in order:",
        test=RANKS + "test_the_best_one_is_kept_however_old_it_is",
    ),
    Mutant(
        name="another_steps_checkpoint_is_complete",
        bug="a checkpoint that was renamed to a later step is resumed as that step",
        file=KEEP,
        before="    if manifest.step != step:",
        after="    if False:",
        test=WHOLE,
    ),
    Mutant(
        name="another_runs_checkpoint_is_complete",
        bug="a checkpoint that was copied from another run is resumed",
        file=KEEP,
        before='if run_id and manifest.author.run not in ("", run_id):',
        after="if False:",
        test=LIFE + "test_a_checkpoint_of_another_run_is_not_taken",
    ),
    Mutant(
        name="files_of_the_manifest_may_be_missing",
        bug="a checkpoint is complete if it has a manifest, whatever became of its files",
        file=KEEP,
        before="        manifest.check_size(folder, name)\n    check_state",
        after="        pass\n    check_state",
        test=WHOLE,
    ),
    Mutant(
        name="the_state_may_be_of_another_step",
        bug="the trainer's state of another step is taken together with the weights",
        file=KEEP,
        before='    if state.get("step") != manifest.step:',
        after="    if False:",
        test=FAULT + "[other step]",
    ),
    Mutant(
        name="a_replaced_checkpoint_is_swept_away",
        bug="after a kill between the two renames of a save, the only checkpoint is removed as a leftover",
        file=KEEP,
        before="            if is_whole or is_part:\n                remove(path)",
        after="            if True:\n                remove(path)",
        test=RANKS + "test_a_checkpoint_that_a_killed_save_had_set_aside_comes_back[False]",
    ),
    Mutant(
        name="a_replaced_checkpoint_is_no_checkpoint",
        bug="what a killed save had set aside is not found any more",
        file=KEEP,
        before="        if match and step_name(step := int(match[1] or match[2])) in name and",
        after="        if match and match[1] and step_name(step := int(match[1])) in name and",
        test=KILLED + "[same step again]",
    ),
    Mutant(
        name="the_old_checkpoint_goes_before_the_new_one_is_there",
        bug="a save of the same step removes the old checkpoint before it renames the new one",
        file=SAVE,
        before="            rename(final, _aside(final))\n",
        after="            remove(final)\n",
        test=KILLED + "[same step again]",
    ),
    Mutant(
        name="the_manifest_may_leave_files_out",
        bug="a manifest that lists no file is that of a complete checkpoint",
        file=FORMAT,
        before="        if unlisted:",
        after="        if False:",
        test=FAULT + "[manifest without files]",
    ),
    Mutant(
        name="the_manifest_may_name_any_path",
        bug="a manifest can have files outside of its folder read",
        file=FORMAT,
        before="        if strange:",
        after="        if False:",
        test=FAULT + "[manifest with a path]",
    ),
    Mutant(
        name="what_is_written_is_hashed_as_it_is_read",
        bug="the hash is of what the disk returns: a bit that flips on its way gets a hash that fits",
        file=DISK,
        before="        os.close(fd)\n    return facts",
        after="        os.close(fd)\n    return hash_file(path)",
        test=KEPT + "test_a_bit_that_flips_on_its_way_to_the_disk_does_not_get_a_hash_that_fits",
    ),
    Mutant(
        name="files_are_not_synced",
        bug="a save goes on before what it has written is on disk, and is committed without its content",
        file=DISK,
        before="        os.fsync(fd)\n    finally:\n        os.close(fd)\n    return facts",
        after="    finally:\n        os.close(fd)\n    return facts",
        test=POWER,
    ),
    Mutant(
        name="names_are_not_synced",
        bug="a save goes on before the names of its files are on disk",
        file=SAVE,
        before="        rename(partial, final)\n        sync_folder(final.parent)\n",
        after="        rename(partial, final)\n",
        test=POWER,
    ),
    Mutant(
        name="a_background_save_reads_the_engine_later",
        bug="a checkpoint that is written while training goes on has weights of later steps",
        file="runs/train/saving.py",
        before="replace(job, shards=tuple(job.shards))",
        after="job",
        test="runs/test_background_saves.py::test_a_copy_is_of_its_step_while_training_goes_on[layout0-changes0]",
    ),
    Mutant(
        name="a_background_save_keeps_no_copy",
        bug="the tensors of a checkpoint that is written while training goes on are the optimizer's own",
        file="storage/checkpoint/host_copies.py",
        before="return kept.copy_(tensor)",
        after="return tensor",
        test="runs/test_background_saves.py::test_a_copy_is_of_its_step_while_training_goes_on[layout0-changes0]",
    ),
    Mutant(
        name="what_does_not_answer_is_not_there",
        bug="a store that times out holds no checkpoint, and the run begins again or goes one back",
        file="storage/checkpoint/object_store.py",
        before='        except FileNotFoundError:\n            return ""',
        after='        except Exception:\n            return ""',
        test="unit/test_checkpoint_answers.py::test_what_may_be_a_checkpoint_is_not_swept_away",
    ),
    Mutant(
        name="an_unfinished_save_in_a_store_is_a_checkpoint",
        bug="what a killed save has left in an object store is taken for a damaged checkpoint",
        file=KEEP,
        before="    return (checkpoint / UNFINISHED).exists() and not (checkpoint / MANIFEST).exists()",
        after="    return False",
        test="runs/test_object_store.py::test_a_kill_at_any_change_leaves_what_was_committed",
    ),
)
