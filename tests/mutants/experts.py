"""Mutants of experts: the router, its terms of the loss, and the ways of the tokens."""

from __future__ import annotations

from .mutant import Mutant
from .named import EXPERTS as DEFINITION
from .named import LAYOUT

EXPERTS, TERMS, STEP = "learning/models/experts.py", "learning/models/router_terms.py", "runs/train/step.py"
MEANS = "independent/test_experts.py::test_a_step_learns_means_over_sequences_tokens_and_layers"
ON_TWO_RANKS = LAYOUT("mixtral,tp=2,pp=2,interleaved,selective")

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
        before="return outputs.index_select(0, places)",
        after="return outputs.index_select(0, order)",
        test=DEFINITION("mixtral"),
    ),
    Mutant(
        name="idle_experts_have_no_gradient",
        bug="an expert without tokens is left out, so that its weights neither decay nor join a sum over ranks",
        file=EXPERTS,
        before="for mlp, part in zip(self._mlps(), parts)]",
        after="for mlp, part in zip(self._mlps(), parts) if len(part)]",
        test="independent/test_experts.py::test_an_expert_without_tokens_has_a_gradient_of_zeros",
    ),
    Mutant(
        name="recomputation_chooses_again",
        bug="a block that is computed again chooses its experts again, and may choose others",
        file=EXPERTS,
        before="self.router(tokens, (batch.chosen_experts or {}).get(self.name))",
        after="self.router(tokens)",
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
)
