"""Mutants of losses: cross-entropy, smoothing, z-loss, denominators and weights of terms."""

from __future__ import annotations

from .mutant import Mutant
from .named import BERT, DECODER, LAYOUT, SMOOTHED, TERMS
from .named import CROSS_ENTROPY as PLAIN

CROSS_ENTROPY, STEP = "parallel/tensor/cross_entropy.py", "runs/train/step.py"
VOCAB_HEAD = "learning/models/vocab_head.py"
SEVERAL = LAYOUT("gpt,train__micro_batch=4")

LOSSES = (
    Mutant(
        name="loss_is_a_mean_of_means",
        bug="a microbatch's loss is the mean over its targets, times the number of its positions",
        file=VOCAB_HEAD,
        before="return Term(self.name, total, count, hits)",
        after="return Term(self.name, total / count.clamp(min=1) * targets.numel(), count, hits)",
        test=SEVERAL,
    ),
    Mutant(
        name="loss_is_divided_by_the_rank_own_count",
        bug="each data rank divides by the number of its own targets",
        file=STEP,
        before="total = run.mesh.dp.sum_(torch.tensor(sums, dtype=torch.float64, device=run.mesh.device))",
        after="total = run.mesh.dp.size * torch.tensor(sums, dtype=torch.float64, device=run.mesh.device)",
        test=LAYOUT("gpt,dp=4,zero_stage=1"),
    ),
    Mutant(
        name="loss_is_divided_by_all_positions",
        bug="the loss is divided by the number of positions, scored or not",
        file="world/batch.py",
        before="return int(np.count_nonzero(present(targets).cpu().numpy() != IGNORE))",
        after="return present(targets).numel()",
        test="conformance/test_zero.py::test_equals_one_process_of_plain_torch[reference zero0 dp1]",
    ),
    Mutant(
        name="unscored_targets_are_in_the_loss",
        bug="the loss counts places without a target",
        file=CROSS_ENTROPY,
        before="total += loss.masked_fill(~chunk_scores.scored, 0).sum()",
        after="total += loss.sum()",
        test=DECODER("gpt2"),
    ),
    Mutant(
        name="unscored_targets_have_gradients",
        bug="places without a target push every word's logit down",
        file=CROSS_ENTROPY,
        before="grad *= factor.masked_fill(~scored, 0).unsqueeze(1)",
        after="grad *= factor.unsqueeze(1)",
        test=DECODER("gpt2"),
    ),
    Mutant(
        name="gradient_of_a_chunk_replaces_the_last",
        bug="the projection's gradient is that of the last chunk of tokens",
        file=CROSS_ENTROPY,
        before="add_product_(grad_weight[rows.held], grad.t(), h)",
        after="torch.mm(grad.t(), h, out=grad_weight[rows.held])",
        test=DECODER("gpt2"),
    ),
    Mutant(
        name="bias_of_the_head_has_the_last_chunks_gradient",
        bug="the head's bias learns from the last chunk of tokens",
        file=CROSS_ENTROPY,
        before="grad_bias[rows.held] += grad.sum(",
        after="grad_bias[rows.held] = grad.sum(",
        test=BERT("True-mlm"),
    ),
    Mutant(
        name="hits_count_everything",
        bug="accuracy counts every scored target as the most likely word",
        file=CROSS_ENTROPY,
        before="hits += ((chunk_scores.target_score >= 0) & chunk_scores.scored).sum()",
        after="hits += chunk_scores.scored.sum()",
        test="independent/test_cross_entropy.py::test_hits_and_scores_are_those_of_the_whole_logits[4]",
    ),
    Mutant(
        name="z_loss_gradient_is_halved",
        bug="the derivative of log²Z lacks its 2",
        file=CROSS_ENTROPY,
        before="factor = (1 + 2 * z_loss * log_z)",
        after="factor = (1 + z_loss * log_z)",
        test=PLAIN("0.3-0.05-3"),
    ),
    Mutant(
        name="z_loss_forgets_the_maximum",
        bug="log Z in the z-loss is that of logits minus their maximum",
        file=CROSS_ENTROPY,
        before="log_z = chunk_scores.log_sum + chunk_scores.max_score",
        after="log_z = chunk_scores.log_sum",
        test=PLAIN("0.3-0.05-3"),
    ),
    Mutant(
        name="smoothing_is_over_the_padded_vocabulary",
        bug="label smoothing divides by the vocabulary with its padding",
        file=CROSS_ENTROPY,
        before="smoothing / vocab",
        after="smoothing / (tp.size * weight.shape[0])",
        test=PLAIN("0.3-0.05-3"),
    ),
    Mutant(
        name="smoothing_is_missing_from_the_targets_gradient",
        bug="the target's logit is pushed up by 1 where label smoothing asks for 1-ε",
        file=CROSS_ENTROPY,
        before="-(1 - smoothing) * is_local",
        after="-1.0 * is_local",
        test=PLAIN("0.3-0.05-3"),
    ),
    Mutant(
        name="smoothing_is_missing_from_the_gradient",
        bug="label smoothing is in the loss, and its gradient lacks what it gives to every word",
        file=CROSS_ENTROPY,
        before="    if smoothing:\n        # a bool",
        after="    if smoothing < 0:\n        # a bool",
        test=PLAIN("0.3-0.05-3"),
    ),
    Mutant(
        name="smoothing_stays_on_in_evaluation",
        bug="held-out text is scored with label smoothing",
        file=VOCAB_HEAD,
        before="smoothing=objective.label_smoothing if training else 0.0,",
        after="smoothing=objective.label_smoothing,",
        test=SMOOTHED("clm"),
    ),
    Mutant(
        name="z_loss_stays_on_in_evaluation",
        bug="held-out text is scored with the z-loss",
        file=VOCAB_HEAD,
        before="z_loss=objective.z_loss if training else 0.0,",
        after="z_loss=objective.z_loss,",
        test=SMOOTHED("clm"),
    ),
    Mutant(
        name="smoothing_of_classes_stays_on_in_evaluation",
        bug="held-out classes are scored with label smoothing",
        file="learning/models/heads.py",
        before="smoothing = self.smoothing if self.training else 0.0",
        after="smoothing = self.smoothing",
        test="independent/test_cross_entropy.py::test_a_task_s_head_smooths_in_training_alone[classify]",
    ),
    Mutant(
        name="the_discriminators_weight_is_one",
        bug="replaced-token detection weighs as much as the generator's loss",
        file="learning/objectives/rtd.py",
        before='"rtd": config.objective.discriminator_weight',
        after='"rtd": 1.0',
        test=TERMS("rtd"),
    ),
    Mutant(
        name="weights_are_in_the_report_only",
        bug="terms are differentiated without their weights, which the logged loss has",
        file=STEP,
        before="torch.full_like(n, weights[name])",
        after="torch.ones_like(n)",
        test=TERMS("rtd"),
    ),
    Mutant(
        name="targets_are_scored_all_at_once",
        bug="evaluation holds the scores of all tokens for all words at a time",
        file="learning/models/vocab_head.py",
        before="softcap=softcap, chunk=loss_chunk(self.config, self.tp, weight),\n",
        after="softcap=softcap,\n",
        test="unit/test_scored.py::test_targets_are_scored_in_chunks",
    ),
)
