"""The rules that parity depends on, each broken by hand: what parity that could not fail would let pass.

A mutant is a function that patches the running process before the model is built. It leaves shapes and the order of
messages as they are, so that nothing hangs and nothing but numbers goes wrong.
"""

from dataclasses import replace

import torch

from roots_dist.assembly import rank_model
from roots_dist.learning.models import block, embed, gpt, norms, positions
from roots_dist.parallel.pipeline import executor
from roots_dist.parallel.tensor import collectives, cross_entropy, embedding, linear
from roots_dist.parallel.zero import reference
from roots_dist.runs.train import check_finite as finite
from roots_dist.runs.train import step
from roots_dist.testing import parity
from roots_dist.world import rng, sharding
from roots_dist.world.batch import PieceOutput

Pending = collectives.Pending


def _own_positions(x, tp):
    """This rank's positions of [B, S, D], without what the others have to add."""
    mine = tp.positions(x.shape[1])
    return x[:, mine.start : mine.stop].contiguous()


def _no_sum(x, tp):
    return Pending(_own_positions(x, tp) if tp.sequence_parallel else x, None)


def column_input_gradient_is_not_summed():
    linear.start_copy_to_backward = _no_sum


def row_output_is_not_summed():
    linear.start_reduce_from = _no_sum


def row_output_is_summed_twice():
    leave = linear.start_reduce_from
    linear.start_reduce_from = lambda x, tp: Pending(leave(x, tp)() * 2, None)


def row_bias_is_added_on_every_rank():
    forward = linear.RowParallelLinear.forward

    def with_more_bias(self, *inputs, activation=None):
        y = forward(self, *inputs, activation=activation)
        return y if self.bias is None else y + (self.tp.size - 1) * self.bias

    linear.RowParallelLinear.forward = with_more_bias


def embedding_is_not_summed():
    embedding.reduce_from_tp_region = lambda x, tp: _own_positions(x, tp) if tp.sequence_parallel else x


def head_input_gradient_is_not_summed():
    gpt.copy_to_tp_region = lambda x, tp: x


def replicated_gradients_are_not_summed():
    step.sum_partial_gradients = lambda params: None


def every_replicated_gradient_is_summed():
    """Also those that each rank already has whole."""
    declared = sharding.Param.replicas.fget
    step.sum_partial_gradients = lambda params: [
        p.tp.sum_(p.tensor.grad) for p in params if declared(p) > 1 and p.tensor.grad is not None
    ]


def tied_gradients_are_not_summed():
    step.sum_tied_gradients = lambda params, ties, dp: None


def norm_counts_replicas_on_every_rank():
    sharding.Param.is_counted = property(lambda p: not p.is_copy)


def norm_counts_the_tied_copy():
    whole = sharding.Param.is_counted.fget

    def counted(groups, over, device):
        sharding.Param.is_counted = property(lambda p: p.is_copy or whole(p))
        try:
            return norm(groups, over, device)
        finally:
            sharding.Param.is_counted = property(whole)

    norm, reference.group_norms = reference.group_norms, counted


def one_rank_does_not_clip():
    """BLOOM-176B: ranks that skipped clipping let their copies of LayerNorm weights drift."""
    factor = reference.clip_factor
    reference.clip_factor = lambda norm, limit: 1.0 if torch.distributed.get_rank() == 1 else factor(norm, limit)


def loss_is_divided_by_the_rank_own_count():
    def own(run, batches):
        return {"clm": sum(int((b.targets != -100).sum()) for b in batches) * run.mesh.dp.size}

    step.count_targets = own


def loss_is_a_mean_of_means():
    forward = gpt.Head.forward

    def mean_of_microbatch(self, payload, batch):
        (term,) = forward(self, payload, batch).results
        return PieceOutput((replace(term, sum=term.sum / term.count * batch.targets.numel()),))

    gpt.Head.forward = mean_of_microbatch


def padded_words_have_probability():
    cross_entropy.num_real_rows = lambda vocab, first, rows: rows


def softmax_sees_its_own_words_only():
    cross_entropy.all_reduce_max = lambda x, tp: x


def dropout_is_keyed_on_the_rank():
    key = rng.key
    rng.key = lambda *parts: key(*parts, torch.distributed.get_rank() if parts[0] == "dropout" else 0)


def dropout_is_keyed_on_the_local_position():
    rows = norms.mask_rows
    norms.mask_rows = lambda seed, site, batch, where, device: rows(seed, site, batch, range(len(where)), device)


def dropout_is_keyed_on_the_place_in_the_microbatch():
    rows = norms.mask_rows

    def local(seed, site, batch, where, device):
        places = torch.arange(len(batch.sample_ids))
        return rows(seed, site, replace(batch, sample_ids=places), where, device)

    norms.mask_rows = local


def positions_are_counted_from_zero_on_every_rank():
    embed.range = lambda *bounds: range(bounds[-1] - (bounds[0] if len(bounds) > 1 else 0))


def every_rank_draws_the_first_slice():
    draw = rng.normal_
    rng.normal_ = lambda out, key, rows, columns, std: draw(out, key, range(len(rows)), range(len(columns)), std)


def initial_weights_are_keyed_on_the_order():
    """As if drawn one after the other: the stage's own numbering gets into the name."""
    names = rank_model.parameters_of

    def renamed(pieces):
        initialize = sharding.initialize
        found = names(pieces)

        def by_order(params, seed):
            initialize([sharding.Param(str(i), p.tensor, p.spec, p.tp) for i, p in enumerate(params)], seed)

        rank_model.initialize = by_order
        return found

    rank_model.parameters_of = renamed


def residual_scale_uses_the_stage_layers():
    init = block.Block.__init__

    def scaled(self, config, tp, *args, **options):
        init(self, config.changed({"model.layers": config.model.layers // config.parallel.pp}), tp, *args, **options)

    block.Block.__init__ = scaled


def alibi_slopes_are_those_of_the_first_heads():
    init = positions.Alibi.__init__
    positions.Alibi.__init__ = lambda self, heads, mine: init(self, heads, slice(0, mine.stop - mine.start))


def put_off_weight_gradients_are_lost():
    collectives.DeferredWeightGrads.drain = lambda self: self.__dict__.update(_work=[]) or []


def microbatches_are_swapped_on_the_last_stage():
    forward = executor.Executor._forward

    def swapped(self, flight, work, batch, *rest):
        other = SWAP.get(work[1], batch) if work[0] == self.num_stages - 1 else batch
        SWAP[work[1] + 1] = batch
        return forward(self, flight, work, other, *rest)

    executor.Executor._forward = swapped


SWAP: dict = {}


def gradients_are_not_summed_over_data_ranks():
    reference._sum_in_place = lambda gradients, dp: None


def recomputation_sees_another_step():
    """A mask drawn anew in backward."""
    rows, seen = norms.mask_rows, set()

    def again(seed, site, batch, where, device):
        key = (site, batch.step, tuple(batch.sample_ids.tolist()))
        step_ = batch.step + (key in seen) * 1000
        seen.add(key)
        return rows(seed, site, replace(batch, step=step_), where, device)

    norms.mask_rows = again


def loss_of_every_tensor_rank_is_reported():
    sum_over_ranks = finite.sum_over_ranks

    def louder(mesh, *given):
        agreed = sum_over_ranks(mesh, *given)
        return agreed._replace(sums={name: total * mesh.tp.size for name, total in agreed.sums.items()})

    step.sum_over_ranks = louder


def mutated_trace(rank: int, size: int, mutant: str, *args):
    globals()[mutant]()
    return parity.trace(rank, size, *args)
