"""Mutants of experts: the router, its terms of the loss, and the ways of the tokens."""

from __future__ import annotations

from .mutant import Mutant
from .named import EXPERT_LAYOUT, LAYOUT
from .named import EXPERTS as DEFINITION

EXPERTS, TERMS, STEP = "learning/models/experts.py", "learning/models/router_terms.py", "runs/train/step.py"
GROUPED, DISPATCH, REFERENCE = "parallel/tensor/grouped.py", "parallel/tensor/dispatch.py", "parallel/zero/reference.py"
LOAD = "runs/train/expert_load.py"
SAVE = "storage/checkpoint/save.py"
MEANS = "independent/test_experts.py::test_a_step_learns_means_over_sequences_tokens_and_layers"
ON_TWO_RANKS = LAYOUT("mixtral,tp=2,pp=2,interleaved,selective")

CUT = EXPERT_LAYOUT("mixtral,dp=2,ep=2,zero_stage=0,model__experts=6")
CUT_AND_SHARDED = EXPERT_LAYOUT("mixtral,dp=4,ep=2,zero_stage=1,model__experts=6")
BIASED = EXPERT_LAYOUT(
    "qwen-moe,dp=2,ep=2,tp=2,sequence_parallel=True,model__experts=6,model__router_bias=True,model__expert_groups=3,"
    "model__groups_per_token=2,optim__router_bias_rate=0.05"
)
ADAPTED = "parity/test_expert_parallel.py::test_adapters_of_experts_are_cut_as_these_are"

EXPERT_MUTANTS = (
    Mutant(
        name="router_gradients_are_not_summed",
        bug="each tensor rank keeps its own part of the router's gradient, and its own router soon",
        file=EXPERTS,
        before="std=std, partial=True)",
        after="std=std)",
        test=ON_TWO_RANKS,
    ),
    Mutant(
        name="router_terms_count_once_per_tensor_rank",
        bug="every tensor rank adds the gradient of balance and z-loss",
        file=TERMS,
        before="total if tp.rank == 0 else total.detach()",
        after="total",
        test=ON_TWO_RANKS,
    ),
    Mutant(
        name="experts_are_summed_by_every_rank",
        bug="the input of experts is not made for a region: its gradient is that of one rank's columns",
        file=EXPERTS,
        before="whole = copy_to_tp_region(x, self.tp)",
        after="whole = x",
        test=ON_TWO_RANKS,
    ),
    Mutant(
        name="ties_go_to_the_last_experts",
        bug="of equal scores the highest expert is chosen, as topk does on a CPU",
        file=EXPERTS,
        before="best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]",
        after="best = scores.shape[1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True)"
        ".indices[:, :per_token]",
        test="independent/test_experts.py::test_of_equal_scores_the_first_experts_are_chosen",
    ),
    Mutant(
        name="expert_weights_are_not_normalized",
        bug="the weights of a token's experts are its scores, which do not sum to 1",
        file=EXPERTS,
        before="if self.normalize:",
        after="if not self.normalize:",
        test=DEFINITION("mixtral"),
    ),
    Mutant(
        name="expert_weights_lose_their_factor",
        bug="routed_scaling_factor is not applied",
        file=EXPERTS,
        before="weights * self.factor)",
        after="weights)",
        test=DEFINITION("deepseek"),
    ),
    Mutant(
        name="sigmoid_scores_are_softmax",
        bug="experts compete for their scores where each has its own",
        file=EXPERTS,
        before="logits.sigmoid() if self.alone else logits.softmax(-1)",
        after="logits.softmax(-1)",
        test=DEFINITION("deepseek"),
    ),
    Mutant(
        name="router_is_as_coarse_as_the_model",
        bug="in bf16 the router's products are rounded to bf16",
        file=EXPERTS,
        before="logits = F.linear(tokens.to(exact), self.weight.to(exact))",
        after="logits = F.linear(tokens, self.weight).to(exact)",
        test="independent/test_experts.py::test_the_router_is_exact_in_bf16",
    ),
    Mutant(
        name="sent_gradients_go_to_other_tokens",
        bug="the gradient of the tokens that were sent to experts is put back in the order of sending",
        file=EXPERTS,
        before="ctx.save_for_backward(places)",
        after="ctx.save_for_backward(order)",
        test=DEFINITION("mixtral"),
    ),
    Mutant(
        name="outputs_return_to_other_tokens",
        bug="what the experts give is put back in the order of sending",
        file=EXPERTS,
        before="Permuted.apply(outputs, places, order)",
        after="Permuted.apply(outputs, order, places)",
        test=DEFINITION("mixtral"),
    ),
    Mutant(
        name="idle_experts_have_no_gradient",
        bug="an expert without tokens is left out, so that its weights neither decay nor join a sum over ranks",
        file=GROUPED,
        before="set_grad(weight, gradient)\n",
        after="set_grad(weight, gradient) if gradient.any() else None\n",
        test="independent/test_experts.py::test_an_expert_without_tokens_has_a_gradient_of_zeros",
    ),
    Mutant(
        name="recomputation_chooses_again",
        bug="a block that is computed again chooses its experts again, and may choose others",
        file=EXPERTS,
        before="choice: Choice | None = (batch.chosen_experts or {}).get(self.name)",
        after="choice: Choice | None = None",
        test="independent/test_experts.py::test_recomputation_takes_the_experts_that_were_chosen",
    ),
    Mutant(
        name="shared_expert_is_not_scaled",
        bug="the shared expert's gate is left out",
        file=EXPERTS,
        before="return y if self.shared_gate is None else",
        after="return y if self.shared_gate is not None else",
        test=DEFINITION("qwen2-moe"),
    ),
    Mutant(
        name="balance_pools_a_microbatch",
        bug="the balance is of all sequences of a microbatch together, and depends on who shares one",
        file=TERMS,
        before="masked_fill(~counted, 0).sum(1) for",
        after="masked_fill(~counted, 0).sum(1).mean(0, keepdim=True).expand(len(real), -1) for",
        test=MEANS,
    ),
    Mutant(
        name="balance_counts_padding",
        bug="padding is counted among the tokens that experts share",
        file=TERMS,
        before="if ids is None else ids != PADDING",
        after="if ids is None else ids == ids",
        test=DEFINITION("mixtral"),
    ),
    Mutant(
        name="balance_takes_scores_for_shares",
        bug="sigmoid scores, which do not sum to 1, are taken for shares",
        file=TERMS,
        before="share = scores / scores.sum(-1, keepdim=True)",
        after="share = scores",
        test=DEFINITION("deepseek"),
    ),
    Mutant(
        name="router_terms_are_sums_over_layers",
        bug="the terms of all layers are divided by the number of sequences or tokens alone",
        file=TERMS,
        before="layers * int(",
        after="int(",
        test=MEANS,
    ),
    Mutant(
        name="router_terms_are_not_learned",
        bug="the loss is that of the objective, without balance and z-loss",
        file=STEP,
        before="return {**run.objective.weights, **router_weights(run.config)}",
        after="return {**run.objective.weights, **dict.fromkeys(router_weights(run.config), 0.0)}",
        test=MEANS,
    ),
    Mutant(
        name="flops_count_every_expert",
        bug="MFU and the balance of stages count the experts that a token does not use",
        file=EXPERTS,
        before="routed = m.experts_per_token * (",
        after="routed = (m.experts or 0) * (",
        test="unit/test_flops.py::test_flops_and_parameters_are_those_of_the_model[experts]",
    ),
    Mutant(
        name="expert_gradients_are_summed_over_other_experts",
        bug="experts of different ranks sum their gradients, as all data ranks do for what they hold alike",
        file="world/mesh.py",
        before="return self.edp if of_expert else self.dp_cp",
        after="return self.dp_cp",
        test=CUT,
    ),
    Mutant(
        name="expert_gradients_are_not_summed",
        bug="ranks that hold the same experts keep the gradients of their own tokens",
        file="world/mesh.py",
        before='edp = both if layout.ep == 1 else along("edp")',
        after='edp = both if layout.ep == 1 else Axis("edp", ranks=(rank,))',
        test=CUT_AND_SHARDED,
    ),
    Mutant(
        name="tokens_are_sent_to_ranks_with_the_same_experts",
        bug="the groups of ranks that hold different experts and of those that hold the same are exchanged",
        file="world/mesh.py",
        before='else along("ep")',
        after='else along("edp")',
        test=CUT_AND_SHARDED,
    ),
    Mutant(
        name="norm_omits_the_experts_of_others",
        bug="each rank clips by the norm of its own experts",
        file=REFERENCE,
        before="else [math.sqrt(square) for square in squares]",
        after="else group_norms(self._counted(), [self.mesh.model], self.mesh.device)",
        test=CUT,
    ),
    Mutant(
        name="norm_counts_all_but_experts_once_per_rank_of_experts",
        bug="the norm of what all ranks hold alike is counted by each rank that has other experts",
        file=REFERENCE,
        before="is_first = self.config.parallel.zero_stage >= 1 or self.mesh.ep.rank == 0",
        after="is_first = True",
        test=CUT,
    ),
    Mutant(
        name="expert_gradients_are_averaged",
        bug="gradients that come to experts are divided by the number of ranks that they come from",
        file=DISPATCH,
        before="return _exchange(grad, *ctx.how), None",
        after="return _exchange(grad, *ctx.how) / ctx.how[0].ep.size, None",
        test=CUT,
    ),
    Mutant(
        name="dispatch_cuts_the_gradient",
        bug="what is sent to other ranks is no part of the graph: router and tokens learn nothing from it",
        file=DISPATCH,
        before="return _exchange(grad, *ctx.how), None",
        after="return torch.zeros_like(_exchange(grad, *ctx.how)), None",
        test=CUT,
    ),
    Mutant(
        name="rows_that_arrive_are_not_sorted",
        bug="rows that arrive stand in the order of the ranks that sent them, not of their experts",
        file=DISPATCH,
        before="order = expert_of_row.argsort(stable=True)",
        after="order = torch.arange(len(expert_of_row))",
        test=CUT,
    ),
    Mutant(
        name="rows_that_arrive_are_of_other_experts",
        bug="the sizes of what arrives are read as of each expert from each rank, not the other way round",
        file=DISPATCH,
        before="every[:here].repeat(tp.ep.size)",
        after="every[:here].repeat_interleave(tp.ep.size)",
        test=CUT,
    ),
    Mutant(
        name="outputs_go_back_to_other_ranks",
        bug="outputs travel back in the order of experts, not of the ranks that sent their tokens",
        file=DISPATCH,
        before="Permuted.apply(outputs, self.places, self.order)",
        after="Permuted.apply(outputs, self.order, self.places)",
        test=CUT,
    ),
    Mutant(
        name="experts_are_named_by_their_place_on_the_rank",
        bug="each rank names and draws its experts from 0: with one seed, they are the same experts",
        file=EXPERTS,
        before="of_expert=True) for number in here}",
        after="of_expert=True) for number in range(each)}",
        test=CUT,
    ),
    Mutant(
        name="checkpoint_keeps_the_experts_of_one_rank",
        bug="only the first of the ranks with different experts writes its own",
        file=SAVE,
        before="        if dp.rank != owner_dp:",
        after="        if dp.rank != owner_dp or (p.spec.of_expert and mesh.ep.rank):",
        test="parity/test_expert_parallel.py::test_a_run_goes_on_with_other_ranks_for_its_experts",
    ),
    Mutant(
        name="biases_weigh_outputs",
        bug="the bias that a router's choice is moved by is a part of the experts' weights as well",
        file=EXPERTS,
        before="weights = scores.gather(-1, chosen)",
        after="weights = (scores if self.bias is None else scores + self.bias).gather(-1, chosen)",
        test=DEFINITION("deepseek-v3"),
    ),
    Mutant(
        name="groups_are_judged_by_their_best_expert",
        bug="groups of experts are chosen by their best expert, not by the sum of their two best",
        file=EXPERTS,
        before="grouped.topk(min(group_score_experts, grouped.shape[2]))",
        after="grouped.topk(1)",
        test=DEFINITION("deepseek-v3"),
    ),
    Mutant(
        name="biases_move_the_wrong_way",
        bug="experts that get much get more",
        file=LOAD,
        before="counts.sum(1, keepdim=True) - counts * counts.shape[1]",
        after="counts * counts.shape[1] - counts.sum(1, keepdim=True)",
        test="independent/test_experts.py::test_each_step_moves_a_bias_towards_even_use",
    ),
    Mutant(
        name="biases_count_the_tokens_of_one_rank",
        bug="each data rank moves the biases of its routers by its own tokens",
        file=LOAD,
        before="counts = run.mesh.dp_cp.sum_(torch.stack([load for _, load in loads]))",
        after="counts = torch.stack([load for _, load in loads])",
        test=BIASED,
    ),
    Mutant(
        name="adapters_of_experts_are_everybodys",
        bug="the adapters of different experts are summed over ranks as if they were one",
        file="parallel/tensor/linear.py",
        before="        of_expert = self.spec.of_expert\n",
        after="        of_expert = False\n",
        test=ADAPTED,
    ),
)
