"""Mutants of pipelines: ties between stages, gradients that travel back, schedules, cuts."""

from __future__ import annotations

from .mutant import Edit, Mutant
from .named import ENGINE, FAMILY, LAYOUT, STRATEGY, T5_LAYOUT, TERMS

EXECUTOR, T5_MODEL, SCHEDULES = "parallel/pipeline/executor.py", "learning/models/t5.py", "schedule/schedules.py"
COMMUNICATION = "schedule/communication.py"
ELECTRA_ON_THREE_STAGES = (
    "electra,pp=3,train__global_batch=6,generator__hidden=32,generator__ffn=128,generator__layers=2,model__layers=1"
)
ZB_H1 = LAYOUT("gpt,pp=3,model__layers=7,train__global_batch=6,schedule=zb-h1")

PIPELINE = (
    Mutant(
        name="each_tensor_rank_sends_the_first_part",
        bug="the parts of a payload that tensor ranks send to the next stage are all its first one",
        file="parallel/pipeline/parts.py",
        before="whole.reshape(-1)[axis.rank * length : (axis.rank + 1) * length]",
        after="whole.reshape(-1)[:length]",
        test=LAYOUT("bloom,tp=2,pp=2,objective__reset_at_documents=True"),
    ),
    Mutant(
        name="what_tensor_ranks_do_not_divide_is_not_sent",
        bug="of a payload whose numbers tensor ranks do not divide, the last ones belong to no rank's part",
        file="parallel/pipeline/parts.py",
        before="return -(-math.prod(shape) // axis.size)",
        after="return math.prod(shape) // axis.size",
        test="unit/test_parts.py::test_the_parts_of_all_ranks_are_the_whole[shape1]",
    ),
    Mutant(
        name="a_part_keeps_the_whole_alive",
        bug="a message that has not arrived keeps the whole activation, of which it is a tp-th",
        file="parallel/pipeline/parts.py",
        before="return part.clone() if part.numel() == length",
        after="return part if part.numel() == length",
        test="unit/test_parts.py::test_a_part_does_not_keep_the_whole",
    ),
    Mutant(
        name="tied_gradients_are_not_summed",
        bug="copies of a tied weight on several stages learn each for itself",
        file="parallel/zero/reference.py",
        before="        sum_tied_gradients(summed, self.ties)\n",
        after="",
        says="embed.tokens.weight",
        test=LAYOUT("gpt,pp=2,train__micro_batch=2"),
    ),
    Mutant(
        name="tied_gradients_are_summed_over_data_ranks_twice",
        bug="DeepSpeed sums over data ranks again a tied weight's gradient, which has been summed over all of them",
        file="parallel/zero/engine.py",
        before="        if self.mesh.dp_cp.rank > 0:\n            for gradient",
        after="        if self.mesh.dp_cp.rank < 0:\n            for gradient",
        test=ENGINE("deepspeed zero1 dp2 pp=2 recompute=full"),
    ),
    Mutant(
        name="third_holder_of_a_tied_weight_is_left_out",
        bug="of the stages that share a weight only the first and the last sum its gradient",
        file="assembly/rank_model.py",
        before="tuple(sorted(ranks)) for name, ranks in sorted(found.items())",
        after="(min(ranks), max(ranks)) for name, ranks in sorted(found.items())",
        test=FAMILY(ELECTRA_ON_THREE_STAGES),
    ),
    Mutant(
        name="relative_tables_are_not_tied",
        bug="stages of one stack learn a table of relative positions each",
        file=T5_MODEL,
        before="shared_params = (table,) if relative else ()",
        after="shared_params = ()",
        says="blocks.0.attention.relative.weight",
        test=T5_LAYOUT("t5-v1.1,pp=4,objective__mask_probability=0.15"),
    ),
    Mutant(
        name="relative_table_of_the_decoder_is_not_tied",
        bug="stages of the decoder learn a table of relative positions each",
        file=T5_MODEL,
        before="shared_params = (table,) if relative else ()",
        after="shared_params = (table,) if relative and not causal else ()",
        says="decoder.blocks.0.attention.relative.weight",
        test=T5_LAYOUT("t5-v1.1,pp=4,objective__mask_probability=0.15"),
    ),
    Mutant(
        name="the_bridge_keeps_its_words_to_itself",
        bug="the decoder's words are not tied to the encoder's where they are on another stage",
        file=T5_MODEL,
        before="0.0, both, shared_params=words)",
        after="0.0, both)",
        test=T5_LAYOUT("t5-v1.1,pp=4,objective__mask_probability=0.15"),
    ),
    Mutant(
        name="encoded_gradient_stays_on_the_last_stage",
        bug="a stage sends back what its own blocks say about the encoder's output, without what it has received",
        file=EXECUTOR,
        before="for name, t in out.payload.items() if t.requires_grad}",
        after='for name, t in out.payload.items() if t.requires_grad and name == "hidden"}',
        test=T5_LAYOUT("t5-v1.1,pp=4,objective__mask_probability=0.15"),
    ),
    Mutant(
        name="put_off_weight_gradients_are_lost",
        bug="weight gradients that a zero-bubble schedule puts off are never computed",
        file="parallel/tensor/deferred.py",
        before="        work, self._work = self._work, []\n        return work",
        after="        self._work = []\n        return []",
        says="blocks.0.attention.query.weight",
        test=ZB_H1,
    ),
    Mutant(
        name="put_off_weight_gradients_replace_each_other",
        bug="a put-off weight gradient overwrites those of the microbatches before",
        file="parallel/tensor/weight_gradient.py",
        before="tp.deferred.defer(add)",
        after='tp.deferred.defer(lambda: (setattr(weight, "grad", None), add()))',
        test=ZB_H1,
    ),
    Mutant(
        name="put_off_weight_gradients_are_recorded",
        bug="autograd records the products that a zero-bubble schedule puts off, and keeps their tensors for a step",
        file="parallel/tensor/deferred.py",
        before="with torch.no_grad():",
        after="with torch.enable_grad():",
        test="parity/test_plan.py::test_running_ranks_hold_and_send_what_was_predicted"
        "[PP2 DP2 ZeRO-2 zb-h1, many blocks]",
    ),
    Mutant(
        name="put_off_weight_gradients_come_after_partial_sums",
        bug="weight gradients that a zero-bubble schedule puts off are added after the sums over ranks",
        file=EXECUTOR,
        before="                self.deferred.run(flight.deferred_grads.pop(work))\n",
        after="                self.deferred._work += flight.deferred_grads.pop(work)\n",
        also=(
            Edit(
                file="runs/train/step.py",
                before="    sums, nonfinite, stop, squares = sum_over_ranks(",
                after="    run.passes.executor.deferred.run(run.passes.executor.deferred.drain())\n"
                "    sums, nonfinite, stop, squares = sum_over_ranks(",
            ),
        ),
        test=LAYOUT("llama,dp=2,tp=2,pp=2,sequence_parallel=True,zero_stage=1,schedule=zb-h1,model__kv_heads=1"),
    ),
    Mutant(
        name="adapters_put_off_come_after_partial_sums",
        bug="the same of LoRA's matrices, whose gradients are partial under tensor parallelism",
        file=EXECUTOR,
        before="                self.deferred.run(flight.deferred_grads.pop(work))\n",
        after="                self.deferred._work += flight.deferred_grads.pop(work)\n",
        also=(
            Edit(
                file="runs/train/step.py",
                before="    sums, nonfinite, stop, squares = sum_over_ranks(",
                after="    run.passes.executor.deferred.run(run.passes.executor.deferred.drain())\n"
                "    sums, nonfinite, stop, squares = sum_over_ranks(",
            ),
        ),
        test=STRATEGY("gpt-instruct+lora,tp=2,pp=2,schedule=zb-h1"),
    ),
    Mutant(
        name="the_last_stage_takes_another_microbatch",
        bug="the last stage reads the targets of the microbatch before",
        file=EXECUTOR,
        before="results += self._forward(flight, work, batches[i], scales, lowest_trainable)",
        after="results += self._forward(\n"
        "                    flight, work, batches[i - (stage == self.num_stages - 1)], scales, lowest_trainable\n"
        "                )",
        test=LAYOUT("gpt,pp=2,train__micro_batch=2"),
    ),
    Mutant(
        name="residual_scale_uses_the_stage_layers",
        bug="residual projections are scaled by the layers of a stage",
        file="learning/models/init_stds.py",
        before="branches = 2 * m.layers if",
        after="branches = 2 * m.layers // config.parallel.pp if",
        test=LAYOUT("gpt,pp=2,train__micro_batch=2"),
    ),
    Mutant(
        name="initial_weights_are_keyed_on_the_order",
        bug="weights are drawn from (seed, number of the parameter on this rank)",
        file="world/sharding.py",
        before='rng.key("init", seed, p.name)',
        after='rng.key("init", seed, list(params).index(p))',
        test=LAYOUT("gpt,pp=2,train__micro_batch=2"),
    ),
    Mutant(
        name="gradient_of_a_stage_takes_the_first_term_only",
        bug="of a stage with two terms only the first is differentiated",
        file=EXECUTOR,
        before="sum(t.sum * scales[t.name] for t in out.results) if out.results else None",
        after="sum(t.sum * scales[t.name] for t in out.results[:1]) if out.results else None",
        test=TERMS("mlm-nsp"),
    ),
    Mutant(
        name="one_warmup_forward_too_few",
        bug="1F1B begins its first backward a forward too early on every rank",
        file=SCHEDULES,
        before="""        [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
        warmup=num_ranks - rank - 1,""",
        after="""        [Action(Kind.BACKWARD, rank, i) for i in range(num_microbatches)],
        warmup=max(num_ranks - rank - 2, 0),""",
        test="unit/test_schedules.py::test_1f1b_is_the_schedule_of_the_paper",
    ),
    Mutant(
        name="zb_h1_puts_off_one_more",
        bug="ZB-H1 runs its weight passes a microbatch later, and holds one activation more",
        file=SCHEDULES,
        before="""action.microbatch >= rank:
            actions.append(weights[action.microbatch - rank])
    return actions + weights[max(num_microbatches - rank, 0) :]""",
        after="""action.microbatch > rank:
            actions.append(weights[action.microbatch - rank - 1])
    return actions + weights[max(num_microbatches - rank - 1, 0) :]""",
        test="unit/test_schedules.py::test_zb_h1_puts_weights_off_by_the_rank",
    ),
    Mutant(
        name="receives_are_posted_when_they_are_needed",
        bug="a receive is posted at its use, so that no transfer overlaps with computation",
        file=COMMUNICATION,
        before="place = min(place, max(uses[receive] - 1, awaited[",
        after="place = min(place, max(uses[receive], awaited[",
        test="unit/test_schedules.py::test_a_receive_is_posted_one_computation_early_unless_its_sender_waits_for_that",
    ),
    Mutant(
        name="receives_are_posted_before_what_their_senders_wait_for",
        bug="GPipe posts the receive of the first gradient before the last forward, and can hang at its peak of memory",
        file=COMMUNICATION,
        before="max(uses[receive] - 1, awaited[channel.sender][_computed(other_end(receive))], 0)",
        after="max(uses[receive] - 1, 0)",
        test="unit/test_schedules.py::test_a_receive_is_posted_one_computation_early_unless_its_sender_waits_for_that",
    ),
    Mutant(
        name="a_tie_of_cuts_takes_the_later_start",
        bug="of equally good cuts the one with longer early stages is taken, which hold more activations",
        file="parallel/pipeline/partition.py",
        before="squares, both_ends, begins[end] = min(scores)",
        after="squares, both_ends, begins[end] = min(scores, key=lambda score: (*score[:2], -score[2]))",
        test="unit/test_partition.py::test_equal_layers_tie_whatever_their_cost",
    ),
)
