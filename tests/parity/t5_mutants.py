"""The rules of two stacks, each broken by hand: as mutants.py, for what only T5 has."""

from roots_dist.learning.models import block, positions
from roots_dist.learning.objectives import spans
from roots_dist.parallel.pipeline import executor
from roots_dist.runs.train import step
from roots_dist.testing import parity
from roots_dist.world import rng


def encoded_gradient_is_that_of_one_block():
    """As if each decoder block overwrote what the one behind it said about the encoder's output."""
    forward = block.Block.forward

    def cut_off(self, payload, batch):
        made = forward(self, payload, batch)
        return made | {"encoded": made["encoded"].detach()} if "encoded" in made else made

    block.Block.forward = cut_off


def encoded_gradient_stays_on_the_last_stage():
    """A stage that hands the encoder's output on sends back its own part of the gradient alone."""
    backward = executor.Executor._backward

    def own_part(self, flight, work, *rest, **options):
        output, loss = flight.outputs[work]
        inputs = flight.inputs[work]
        if "encoded" in output and "encoded" in inputs:
            flight.outputs[work] = {n: t.detach() if n == "encoded" else t for n, t in output.items()}, loss
        backward(self, flight, work, *rest, **options)

    executor.Executor._backward = own_part


def _leave_out(ends):
    summed = step.sum_tied_gradients
    step.sum_tied_gradients = lambda params, ties, dp: summed(
        params, {n: axis for n, axis in ties.items() if not n.endswith(ends)}, dp
    )


def copies_of_tables_are_not_summed():
    _leave_out("relative.weight")


def copies_of_the_decoder_table_are_not_summed():
    _leave_out("decoder.blocks.0.attention.relative.weight")


def the_bridge_keeps_its_words_to_itself():
    _leave_out("embed.tokens.weight")


def every_rank_has_the_table_of_the_first_heads():
    bias = positions.Relative.bias

    def of_the_first(self, queries, num_keys, like):
        (_, tp) = self.shard_specs["weight"]
        return bias(self, queries, num_keys, like).roll(tp.rank, 0)

    positions.Relative.bias = of_the_first


def dropout_in_the_mlp_is_keyed_on_local_channels():
    drop = rng.dropout
    rng.dropout = lambda x, share, rows, first_column=0: drop(x, share, rows)


CALLS: list = []


def sentinels_are_keyed_on_the_place_in_the_microbatch():
    sample = spans.Spans.sample

    def turned(self, source, index, draw):
        CALLS.append(index)
        fields, ids = sample(self, source, index, draw), self.specials.sentinels[: self.lengths.spans]
        to = dict(zip(ids, ids[len(CALLS) % len(ids) :] + ids[: len(CALLS) % len(ids)]))
        for name in ("tokens", "targets", "decoder_tokens"):
            fields[name] = fields[name].copy()
            fields[name][:] = [to.get(int(i), int(i)) for i in fields[name]]
        return fields

    spans.Spans.sample = turned


def mutated_trace(rank: int, size: int, mutant: str, *args):
    globals()[mutant]()
    return parity.trace(rank, size, *args)
