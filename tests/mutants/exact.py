"""Mutants of exact runs: they round otherwise, which a comparison in float64 can hardly see."""

from __future__ import annotations

from .mutant import Mutant
from .named import BITS

EXACT = (
    Mutant(
        name="shards_are_added_one_after_another",
        bug="the shards that one rank holds are added in their order, not as a tree",
        file="world/tree_sum.py",
        before="return tree_sum_of(dict(enumerate(parts)))",
        after="return sum(parts[1:], parts[0])",
        test=BITS("llama-degrees1-changes1"),
    ),
    Mutant(
        name="data_shards_share_an_accumulator",
        bug="a rank with several data shards adds the gradients of all its microbatches one after another",
        file="world/exact.py",
        before="self._per_shard = num_microbatches // self.data_shards",
        after="self._per_shard = num_microbatches",
        test=BITS("gpt-degrees0-changes0"),
    ),
    Mutant(
        name="exact_norm_is_a_sum_of_fractions",
        bug="squares of gradients are added as floating-point numbers, in an order that the layout decides",
        file="parallel/zero/reference.py",
        before="of_groups = exact_group_norms if self.exact else group_norms",
        after="of_groups = group_norms",
        test=BITS("gpt-degrees0-changes0"),
    ),
    Mutant(
        name="each_rank_scales_squares_by_its_own_largest",
        bug="whole numbers that ranks add up are cut from squares in units of each rank's own",
        file="parallel/optim/norm.py",
        before="            dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)\n",
        after="            pass\n",
        test=BITS("gpt-degrees0-changes0"),
    ),
    Mutant(
        name="tails_of_tensors_are_stepped_where_they_end",
        bug="AdamW rounds the last few numbers of a rank's slice otherwise than numbers inside a longer tensor",
        file="parallel/optim/groups.py",
        before="UNIT = 16",
        after="UNIT = 1",
        test="parity/test_exact.py::test_no_bit_depends_on_where_a_tensor_ends_that_adamw_steps",
    ),
    Mutant(
        name="tails_of_channels_follow_the_layout",
        bug="an activation of several shards is computed at once, so that its tail has another length",
        file="parallel/tensor/exact.py",
        before="return join([f(*parts) for parts in zip(*(split(x, tp.shards) for x in xs))])",
        after="return f(*xs)",
        test="parity/test_exact.py::test_no_bit_depends_on_where_a_shard_of_channels_ends[silu]",
    ),
    Mutant(
        name="rows_of_all_runs_are_added_at_once",
        bug="the gradient of a norm is one sum over all positions, where several ranks would each add up their own",
        file="parallel/tensor/by_positions.py",
        before="partial(_runs, ctx.num)",
        after="partial(_runs, 1)",
        test=BITS("gpt-degrees0-changes0"),
    ),
    Mutant(
        name="runs_keep_the_strides_of_the_whole",
        bug="a run of positions of one text has another stride than on a rank of its own, and a product with frozen "
        "weights another kernel",
        file="parallel/tensor/exact.py",
        before="return x.contiguous().view(x.shape)",
        after="return x.contiguous()",
        test="parity/test_exact.py::test_no_bit_depends_on_how_many_rows_are_computed_together"
        "[rmsnorm-torch.float32-one text, frozen]",
    ),
    Mutant(
        name="adapters_read_all_runs_at_once",
        bug="the second matrix of an adapter learns from all positions at once, where several ranks would each add up "
        "their own",
        file="parallel/tensor/linear.py",
        before="by_positions(tp, self.lora, *made, self.lora.b.weight)",
        after="self.lora(*made)",
        test=BITS("llama+lora-degrees2-changes2"),
    ),
    Mutant(
        name="context_shards_share_an_accumulator",
        bug="a rank with several context shards adds their gradients one after another, microbatch by microbatch",
        file="world/exact.py",
        before="key = Key(self._data, context, part, use or 0)",
        after="key = Key(self._data, 0, part, use or 0)",
        test=BITS("gpt-degrees3-changes3"),
    ),
    Mutant(
        name="data_shards_are_added_before_context_shards",
        bug="a rank with several data shards of a part of each text adds them up before the other parts are added",
        file="world/exact.py",
        before="return self.cp.size > 1 and self.data_shards > 1",
        after="return False",
        test=BITS("gpt-degrees3-changes3"),
    ),
    Mutant(
        name="router_shards_share_an_accumulator",
        bug="what the tensor shards of one rank give to the gradient of a router is added microbatch by microbatch",
        file="parallel/tensor/exact.py",
        before="return recorded(self.tp, parameter, self.number, self.context)",
        after="return recorded(self.tp, parameter, 0, self.context)",
        test=BITS("qwen-moe-degrees4-changes4"),
    ),
    Mutant(
        name="tokens_of_all_shards_of_a_region_are_one",
        bug="what the tensor shards of experts give to the gradient of their input is added in autograd's order",
        file="learning/models/experts.py",
        before="enumerate(spread(text, self.tp.shards))",
        after="enumerate([text] * self.tp.shards)",
        test=BITS("qwen-moe-degrees4-changes4"),
    ),
    Mutant(
        name="experts_add_context_shards_at_once",
        bug="what the context shards of one rank give to the gradient of an expert is added microbatch by microbatch",
        file="parallel/tensor/exact.py",
        before="return Shard(exact, weight, index, context=self.context)",
        after="return Shard(exact, weight, index)",
        test=BITS("mixtral-degrees5-changes5"),
    ),
    Mutant(
        name="exact_norm_keeps_24_bits",
        bug="what is left of a square after its first 24 bits is left out of the norm",
        file="parallel/optim/norm.py",
        before="BITS, LEVELS = 24, 3",
        after="BITS, LEVELS = 24, 1",
        test="parity/test_exact.py::test_the_norm_is_the_same_sum_in_any_order",
    ),
    Mutant(
        name="heads_of_all_shards_are_attended_together",
        bug="attention runs on all heads of a rank at once, so that their number decides which kernel computes them",
        file="learning/models/attention.py",
        before="self._by_shards if self.tp.shards > 1 and batch.cache is None else self._whole",
        after="self._whole",
        test="parity/test_exact.py::test_no_bit_depends_on_how_many_heads_are_attended_together",
    ),
    Mutant(
        name="the_heads_gradient_is_lost_in_every_layout",
        bug="what the head gives to a weight that others give a gradient too is not added, in one process neither",
        file="parallel/tensor/cross_entropy.py",
        before="    kept.grad.add_(gradient)\n",
        after="    pass\n",
        test="parity/test_exact.py::test_an_exact_run_computes_what_a_plain_one_does[bert-degrees2]",
    ),
)
