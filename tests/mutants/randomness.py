"""Mutants of random numbers: dropout and initial weights."""

from __future__ import annotations

from .mutant import Mutant
from .named import BEGINNINGS, LAYOUT, MASKS, T5_LAYOUT

BLOCK, NORMS, RNG = "learning/models/block.py", "learning/models/norms.py", "world/rng.py"
INIT_STDS = "learning/models/init_stds.py"
SEVERAL = LAYOUT("gpt,train__micro_batch=4")
"""Four sequences in a microbatch against one at a time."""

RANDOMNESS = (
    Mutant(
        name="dropout_is_keyed_on_the_rank",
        bug="each tensor rank seeds its dropout with its number",
        file=NORMS,
        before="mask_rows(self.seed, self.site, batch, mine, x.device)",
        after="mask_rows(self.seed + self.tp.rank, self.site, batch, mine, x.device)",
        test=LAYOUT("llama,tp=2,model__kv_heads=1"),
    ),
    Mutant(
        name="dropout_is_keyed_on_the_local_position",
        bug="under sequence parallelism each rank counts its positions from 0 for dropout",
        file=NORMS,
        before="mine = self.tp.held_positions(x.shape[1])",
        after="mine = type(self.tp.held_positions(x.shape[1]))((range(x.shape[1]),))",
        test=LAYOUT("llama,tp=4,sequence_parallel=True,model__attention_dropout=0.1"),
    ),
    Mutant(
        name="dropout_is_keyed_on_the_place_in_the_microbatch",
        bug="the n-th sequence of every microbatch has the same dropout mask",
        file=NORMS,
        before="site), batch.sample_ids)",
        after="site), torch.arange(len(batch.sample_ids), device=device))",
        test=SEVERAL,
    ),
    Mutant(
        name="dropout_draws_from_torchs_stream",
        bug="dropout is torch's own, whose masks depend on what was drawn before",
        file=NORMS,
        before="return rng.dropout(x, self.drop, rows, fuse=self.tp.fuse)",
        after="return F.dropout(x, self.drop)",
        test=SEVERAL,
    ),
    Mutant(
        name="recomputed_mlp_is_not_dropped",
        bug="with selective recomputation T5's inner channels are not dropped",
        file="learning/models/mlp.py",
        before="return (self.down, wide, activated) if self.recompute",
        after="return (self.down, wide, self.activation) if self.recompute",
        test=T5_LAYOUT("t5,pp=2,gpipe,dp=2,zero=0,selective"),
    ),
    Mutant(
        name="t5_queries_are_drawn_without_the_heads_width",
        bug="T5's queries are drawn as wide as its keys, although attention is not scaled",
        file=INIT_STDS,
        before="(m.hidden * head) ** -0.5",
        after="m.hidden**-0.5",
        test="reference/test_t5_transformers.py::test_initial_weights_are_drawn_as_transformers_draws_them[v1.0]",
    ),
    Mutant(
        name="dropout_forgets_the_step",
        bug="every step drops the same",
        file=NORMS,
        before='rng.key("dropout", seed, batch.step, site)',
        after='rng.key("dropout", seed, site)',
        test="independent/test_random_numbers.py::"
        "test_masks_whose_keys_differ_in_one_coordinate_are_independent[{'step': 2}]",
    ),
    Mutant(
        name="dropout_forgets_the_site",
        bug="every layer drops the same places",
        file=NORMS,
        before='rng.key("dropout", seed, batch.step, site)',
        after='rng.key("dropout", seed, batch.step)',
        test=MASKS("clm"),
    ),
    Mutant(
        name="both_branches_of_a_block_drop_the_same",
        bug="the dropout after the MLP has the key of the one after attention",
        file=BLOCK,
        before='self.dropout2 = Dropout(config, tp, f"{name}.2")',
        after='self.dropout2 = Dropout(config, tp, f"{name}.1")',
        test=MASKS("clm"),
    ),
    Mutant(
        name="heads_drop_the_same",
        bug="every head of a layer has the same attention dropout",
        file="learning/models/attention.py",
        before="return rng.fold(rows.unsqueeze(1), heads.unsqueeze(1))",
        after="return rows.unsqueeze(1).expand(-1, h, -1)",
        test=MASKS("clm"),
    ),
    Mutant(
        name="dropout_keeps_what_it_should_drop",
        bug="with probability `drop` a number is kept",
        file=RNG,
        before="return _reach(_unfinished_bits(rows, columns), limit_of(drop))",
        after="return ~_reach(_unfinished_bits(rows, columns), limit_of(drop))",
        test="independent/test_random_numbers.py::test_masks_drop_as_often_as_they_say_and_scale_the_rest[0.1]",
    ),
    Mutant(
        name="masks_compare_unfinished_bits",
        bug="where the upper half of a hash is that of the limit, a mask is not the one of a GPU",
        file=RNG,
        before="(x ^ ((limit >> 16) & 0xFFFF)) >= limit",
        after="x >= limit",
        test="independent/test_random_numbers.py::test_a_mask_keeps_what_is_at_least_its_limit",
    ),
    Mutant(
        name="what_is_kept_is_not_scaled",
        bug="dropout does not multiply what it keeps by 1/(1-p)",
        file=RNG,
        before="torch.mul(flat[part], 1 / (1 - drop), out=out[part])",
        after="out[part].copy_(flat[part])",
        test="independent/test_random_numbers.py::test_masks_drop_as_often_as_they_say_and_scale_the_rest[0.1]",
    ),
    Mutant(
        name="blocks_of_a_large_matrix_begin_alike",
        bug="a matrix that is drawn in several blocks repeats the rows of the first",
        file=RNG,
        before="torch.arange(rows.start + start, rows.start + min(start + block, len(rows)), device",
        after="torch.arange(rows.start, rows.start + min(block, len(rows) - start), device",
        test="independent/test_initial_weights.py::test_beyond_a_block_of_the_generator_numbers_go_on_as_one_by_one",
    ),
    Mutant(
        name="normal_numbers_are_half_of_a_pair",
        bug="radius and angle of Box-Muller come from one hash",
        file=RNG,
        before="for part in (0, 1)",
        after="for part in (0, 0)",
        test="independent/test_random_numbers.py::test_normal_draws_are_normal",
    ),
    Mutant(
        name="residual_scale_counts_blocks_once",
        bug="residual projections are scaled by the root of the blocks, not of their two branches",
        file=INIT_STDS,
        before="branches = 2 * m.layers if",
        after="branches = m.layers if",
        test=BEGINNINGS("gpt"),
    ),
    Mutant(
        name="residual_scale_is_not_by_the_root",
        bug="residual projections are scaled by the number of branches, not by its root",
        file=INIT_STDS,
        before="last = m.std() / math.sqrt(branches)",
        after="last = m.std() / branches",
        test=BEGINNINGS("gpt"),
    ),
    Mutant(
        name="bert_is_scaled_as_gpt",
        bug="BERT's residual projections begin smaller too",
        file=INIT_STDS,
        before='branches = 2 * m.layers if family_of(config).init == "residual" else 1',
        after="branches = 2 * m.layers",
        test=BEGINNINGS("bert"),
    ),
    Mutant(
        name="weights_ignore_the_seed",
        bug="every seed begins with the same weights",
        file="world/sharding.py",
        before='rng.key("init", seed, p.name)',
        after='rng.key("init", p.name)',
        test="independent/test_initial_weights.py::test_no_two_parameters_and_no_two_seeds_begin_alike[gpt]",
    ),
)
