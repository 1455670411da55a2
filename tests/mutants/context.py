"""Mutants of context parallelism: what other systems got wrong when positions were cut over ranks."""

from __future__ import annotations

from .mutant import Edit, Mutant
from .named import IN_CONTEXT

CONTEXT_FILE, ATTENTION = "parallel/tensor/context.py", "learning/models/attention.py"
HEADS, VOCAB_HEAD = "learning/models/heads.py", "learning/models/vocab_head.py"
GROUPED = IN_CONTEXT("llama,cp=4,model__attention_dropout=0.1")
BORDERS = IN_CONTEXT("bloom,cp=2,objective__reset_at_documents=True")
EXCHANGED = IN_CONTEXT("bloom,cp=4,cp_kind=heads,objective__reset_at_documents=True")
LATE = "independent/test_attention.py::test_later_queries_attend_as_with_a_mask[cpu-dtype0-1e-12]"
LEARNED = IN_CONTEXT("gpt,cp=2,dp=2,zero_stage=1")

CONTEXT = (
    Mutant(
        name="context_gradients_of_keys_are_not_summed",
        bug="each context rank keeps the gradients that its own queries give its keys and values",
        file=CONTEXT_FILE,
        before="    dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=tp.cp.group)\n",
        after="    mine.copy_(parts[tp.cp.rank])\n",
        test=GROUPED,
    ),
    Mutant(
        name="context_keys_are_in_the_order_of_ranks",
        bug="gathered keys stand in the order of ranks, not of positions",
        file=CONTEXT_FILE,
        before="    return torch.cat([*early, *late.flip(0)], -2)",
        after="    return torch.cat([*every], -2)",
        test=GROUPED,
    ),
    Mutant(
        name="context_late_chunks_are_not_turned_round",
        bug="the late chunks are put in the order of ranks, which hold them from the end",
        file=CONTEXT_FILE,
        before="[*early, *late.flip(0)]",
        after="[*early, *late]",
        test=GROUPED,
    ),
    Mutant(
        name="context_gradients_go_to_other_chunks",
        bug="the gradient of a late chunk goes to the rank that mirrors its holder",
        file=CONTEXT_FILE,
        before="torch.cat([chunks[rank], chunks[-1 - rank]], -2)",
        after="torch.cat([chunks[rank], chunks[rank + tp.cp.size]], -2)",
        test=GROUPED,
    ),
    Mutant(
        name="context_backward_sees_its_own_keys",
        bug="backward takes the keys and values of this rank for those of all",
        file=CONTEXT_FILE,
        before="            self._again = self.finish(mine)",
        after="            self._again = torch.cat([mine] * self._tp.cp.size, -2)",
        test=BORDERS,
    ),
    Mutant(
        name="context_keys_are_kept_whole",
        bug="the keys and values of the whole sequence are kept between forward and backward",
        file=CONTEXT_FILE,
        before="    if saved or not whole.requires_grad:",
        after="    if True or not whole.requires_grad:",
        test="parity/test_context.py::test_context_ranks_send_what_the_document_says",
    ),
    Mutant(
        name="context_ranks_hold_runs",
        bug="each context rank holds one run of positions: right, but the last one has twice the work",
        file="world/positions.py",
        before="for i in (rank, 2 * size - 1 - rank)))",
        after="for i in (2 * rank, 2 * rank + 1)))",
        test="parity/test_context.py::test_every_rank_has_the_same_work_and_every_position_is_held_once[4]",
    ),
    Mutant(
        name="context_ranks_count_positions_from_zero",
        bug="learned positions are those of the first context rank on every rank",
        file="learning/models/embed.py",
        before="        mine = self.tp.positions(tokens.shape[1] * self.tp.cp.size)\n",
        after="        mine = Positions((range(tokens.shape[1]),))\n",
        also=(
            Edit(
                file="learning/models/embed.py",
                before="from roots_dist.world.sharding import ShardSpec, declare\n",
                after="from roots_dist.world.positions import Positions\n"
                "from roots_dist.world.sharding import ShardSpec, declare\n",
            ),
        ),
        test=LEARNED,
    ),
    Mutant(
        name="context_keys_are_rotated_from_zero",
        bug="queries and keys are rotated by their place on the rank, not in the sequence",
        file=ATTENTION,
        before="            q, k = self.positions(q, queries), self.positions(k, queries)",
        after="            local = Positions((range(q.shape[2]),))\n"
        "            q, k = self.positions(q, local), self.positions(k, local)",
        test=GROUPED,
    ),
    Mutant(
        name="context_dropout_is_keyed_by_the_place_on_the_rank",
        bug="context ranks drop the same channels of different positions",
        file="learning/models/norms.py",
        before="        mine = self.tp.held_positions(x.shape[1])",
        after="        mine = Positions((range(x.shape[1]),))",
        test=LEARNED,
    ),
    Mutant(
        name="context_attention_dropout_is_keyed_by_the_range",
        bug="the rows of attention's dropout begin anew in each range of queries",
        file=ATTENTION,
        before="batch, Positions((queries,)), q.device)",
        after="batch, Positions((range(len(queries)),)), q.device)",
        test=GROUPED,
    ),
    Mutant(
        name="context_documents_are_those_of_the_first_positions",
        bug="a range of queries has the documents of the first positions of the text",
        file=ATTENTION,
        before="documents = batch.document_ranges if bordered else None",
        after="documents = None if not bordered else tuple(tuple(range(d.start + queries.start, d.stop + queries.start)"
        " for d in row) for row in batch.document_ranges)",
        test=BORDERS,
    ),
    Mutant(
        name="context_late_queries_see_the_future",
        bug="a late range of queries attends to all keys of its own range",
        file="learning/models/tiles.py",
        before="Part(whole, Edge.CAUSAL)",
        after="Part(whole, Edge.NONE)",
        test=LATE,
    ),
    Mutant(
        name="context_late_queries_are_masked_from_the_left",
        bug="with dropout on the scores, the first query of a late range sees one key",
        file="learning/models/attention_by_heads.py",
        before="-torch.inf).triu_(1 + keys - queries)",
        after="-torch.inf).triu_(1)",
        test=LEARNED,
    ),
    Mutant(
        name="context_parts_have_their_own_sums",
        bug="the backward of one part of the keys takes the log-sum-exp of that part",
        file="learning/models/fused_attention.py",
        before="            lse[tile.rows, :, mine] = merged\n",
        after="            lse[tile.rows, :, mine] = found[0][1]\n",
        test=LATE,
    ),
    Mutant(
        name="context_keys_are_sent_before_they_are_rotated",
        bug="keys that are on their way while queries are computed have not been rotated",
        file=ATTENTION,
        before="self.positions(k, places) if isinstance(self.positions, Rotary) else k, v])",
        after="k, v])",
        test=GROUPED,
    ),
    Mutant(
        name="context_keys_are_sent_before_they_are_normed",
        bug="keys that are on their way while queries are computed have not been normed",
        file=ATTENTION,
        before="        if isinstance(self.key_norm, HeadNorm):\n            k = self.key_norm(k)\n",
        after="",
        test=IN_CONTEXT("gemma,cp=2"),
    ),
    Mutant(
        name="context_gather_waits_for_queries",
        bug="keys are sent when queries are there, and nothing hides it",
        file=ATTENTION,
        before="start if self._gathers_early() else None",
        after="None",
        test="parity/test_context.py::test_keys_travel_while_queries_are_computed",
    ),
    Mutant(
        name="context_backward_gathers_when_it_must",
        bug="backward begins to gather keys again when it cannot go on without them",
        file=ATTENTION,
        before="        if gather.later is not None and out.requires_grad:",
        after="        if False:",
        test="parity/test_context.py::test_keys_travel_while_queries_are_computed",
    ),
    Mutant(
        name="context_heads_are_exchanged_in_turns",
        bug="heads are dealt out in turns and taken back in runs",
        file=CONTEXT_FILE,
        before="x.unflatten(-3, (tp.cp.size, -1)).movedim(-4, 0)",
        after="x.unflatten(-3, (-1, tp.cp.size)).movedim(-3, 0)",
        test=IN_CONTEXT("t5,cp=2,cp_kind=heads"),
    ),
    Mutant(
        name="context_heads_have_the_slopes_of_the_first",
        bug="where heads are exchanged every rank has the biases of the first ones",
        file=ATTENTION,
        before="bias[mine.start : mine.stop]",
        after="bias[: len(mine)]",
        test=EXCHANGED,
    ),
    Mutant(
        name="context_heads_drop_as_the_first",
        bug="where heads are exchanged every rank drops the probabilities of the first ones",
        file=ATTENTION,
        before="self.tp.rank * self.num_heads + self.tp.attending(self.num_heads, self._shard).start",
        after="self.tp.rank * self.num_heads",
        test=IN_CONTEXT("t5,cp=2,cp_kind=heads"),
    ),
    Mutant(
        name="context_heads_see_the_positions_of_a_rank",
        bug="where heads are exchanged queries are those of the rank's own positions",
        file=ATTENTION,
        before="            queries = Positions((range(q.shape[2]),))",
        after="            queries = Positions((range(q.shape[2] // 2, q.shape[2] + q.shape[2] // 2),))",
        test=IN_CONTEXT("t5,cp=2,cp_kind=heads"),
    ),
    Mutant(
        name="context_targets_are_shifted_after_the_cut",
        bug="each chunk predicts its own next token, and its last position nothing",
        file=VOCAB_HEAD,
        before="        targets, flat = self.tp.of_context(present(batch.targets)).flatten(), x.flatten(0, 1)\n",
        after="        tokens = self.tp.of_context(batch.tokens)\n"
        "        cut = self.tp.cp.size > 1\n"
        "        targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORE) if cut else present(batch.targets)\n"
        "        targets, flat = targets.flatten(), x.flatten(0, 1)\n",
        test=LEARNED,
    ),
    Mutant(
        name="context_loss_is_a_mean_of_ranks",
        bug="the loss is divided by the targets of context ranks and data ranks, as if each had read others",
        file="runs/train/step.py",
        before="    total = run.mesh.dp.sum_(torch.tensor(",
        after="    total = run.mesh.dp_cp.sum_(torch.tensor(",
        test=LEARNED,
    ),
    Mutant(
        name="context_gradients_are_summed_over_data_ranks_only",
        bug="each context rank updates its weights by the gradient of its own positions",
        file="world/mesh.py",
        before='        both = along("dp_cp") if min(layout.dp, layout.cp) > 1 else cp if layout.cp > 1 else dp\n',
        after="        both = dp\n",
        test=GROUPED,
    ),
    Mutant(
        name="context_ranks_all_count_a_pair",
        bug="the loss of a pair is counted by every context rank",
        file=VOCAB_HEAD,
        before="        pairs &= tp.cp.rank == 0",
        after="        pairs &= tp.cp.rank >= 0",
        test=IN_CONTEXT("gpt-prefers,cp=2"),
    ),
    Mutant(
        name="context_answers_are_scored_in_parts",
        bug="a pair's margin is that of the positions of one rank",
        file=VOCAB_HEAD,
        before="gained = tp.cp.sum_(answer_scores(scores.view_as(targets), documents))",
        after="gained = answer_scores(scores.view_as(targets), documents)",
        test=IN_CONTEXT("gpt-prefers,cp=2"),
    ),
    Mutant(
        name="context_ranks_all_read_a_position",
        bug="a head that reads one position reads the first one of each context rank",
        file=HEADS,
        before="    scored = labels if labels is None else labels.masked_fill(~held, IGNORE)",
        after="    scored = labels",
        test=IN_CONTEXT("bert-classify,cp=2"),
    ),
    Mutant(
        name="context_encoder_is_seen_in_part",
        bug="an encoder's queries see only the keys before them on other ranks",
        file=ATTENTION,
        before="keys, values = both[:, :, :, : r.stop if self.causal else None]",
        after="keys, values = both[:, :, :, : r.stop]",
        test=IN_CONTEXT("electra,cp=2"),
    ),
    Mutant(
        name="context_samples_are_keyed_by_the_place_on_the_rank",
        bug="ELECTRA's generator draws its tokens by the place on the rank",
        file="learning/models/electra.py",
        before="self.tp.in_region(x.shape[1]).places(x.device))",
        after="torch.arange(x.shape[1], device=x.device))",
        test=IN_CONTEXT("electra,cp=2"),
    ),
)
