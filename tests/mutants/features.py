"""Mutants of features that few families have: windows, norms of queries and keys, soft caps, scaled rotary positions,
parallel branches."""

from __future__ import annotations

from .mutant import Mutant
from .named import ATTENDS, CAPPED, LAYOUT, SCALED

ATTENTION, QK_NORM = "learning/models/attention.py", "learning/models/qk_norm.py"
BLOCK, EMBED = "learning/models/block.py", "learning/models/embed.py"
ROTARY, POSITIONS = "learning/models/rotary.py", "learning/models/positions.py"
LATENT = "learning/models/latent_attention.py"

FEATURES = (
    Mutant(
        name="window_is_one_too_wide",
        bug="a query sees the key that has just left its window",
        file=POSITIONS,
        before="distance >= self.size",
        after="distance > self.size",
        test=ATTENDS("window-0.0"),
    ),
    Mutant(
        name="window_begins_where_keys_fill_it",
        bug="with one key more than the window has, nothing is masked",
        file=ATTENTION,
        before="if self.window is not None and len(keys) > self.window.size:",
        after="if self.window is not None and len(keys) > self.window.size + 1:",
        test=ATTENDS("window of all but one-0.3"),
    ),
    Mutant(
        name="cache_of_a_window_is_one_too_short",
        bug="a cache drops a key that the next token's window still has",
        file=ATTENTION,
        before="keep=None if self.window is None else self.window.size - 1)",
        after="keep=None if self.window is None else self.window.size - 2)",
        test="runs/test_runs.py::test_kept_keys_and_values_say_what_reading_it_all_again_says[window]",
    ),
    Mutant(
        name="scores_are_capped_behind_the_mask",
        bug="the soft cap makes masked scores finite: every key is seen",
        file=ATTENTION,
        before="        p = scores.softmax(-1)\n",
        after="        scores = scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)\n"
        "        p = scores.softmax(-1)\n",
        test=ATTENDS("capped-0.0"),
    ),
    Mutant(
        name="attention_ignores_its_own_scale",
        bug="scores are scaled by the head's width where the model has a scale of its own",
        file=ATTENTION,
        before="self.scale = m.attention_scale\n",
        after="self.scale = m.width_of_head() ** -0.5\n",
        test=ATTENDS("capped-0.0"),
    ),
    Mutant(
        name="logits_cap_has_no_slope",
        bug="the gradient passes the cap of the logits as if there were none",
        file="parallel/tensor/cross_entropy.py",
        before="                    grad *= slope\n",
        after="                    pass\n",
        test=CAPPED("0.3-0.05"),
    ),
    Mutant(
        name="head_norms_gradient_is_whole",
        bug="the norm of queries and keys learns from this rank's heads alone",
        file=QK_NORM,
        before="fill=fill, partial=True), tp.axis)",
        after="fill=fill), tp.axis)",
        says="attention.query_norm.weight",
        test=LAYOUT("gemma,tp=2,sp,dp=2,zero=1"),
    ),
    Mutant(
        name="whole_norm_is_of_this_ranks_heads",
        bug="the norm over all heads takes the mean of this rank's channels",
        file=QK_NORM,
        before="total = sum_in_tp_region(torch.stack(squares, -1), tp)",
        after="total = torch.stack(squares, -1) * tp.size",
        test=LAYOUT("olmo,tp=2,pp=2,gpipe"),
    ),
    Mutant(
        name="whole_norms_gradient_is_of_this_ranks_heads",
        bug="the sum of squares over ranks passes back this rank's gradient alone",
        file="parallel/tensor/collectives.py",
        before="        return start_all_reduce(grad.clone(), ctx.tp)(), None\n\n\ndef sum_in_tp_region",
        after="        return grad, None\n\n\ndef sum_in_tp_region",
        test=LAYOUT("olmo,tp=2,pp=2,gpipe"),
    ),
    Mutant(
        name="shared_heads_count_once_for_each_holder",
        bug="the norm over all key heads counts a head as often as ranks hold it",
        file=QK_NORM,
        before="x.square().sum(-1) / n.holders",
        after="x.square().sum(-1)",
        test=LAYOUT("olmo,tp=4,sp,dp=2,zero=0"),
    ),
    Mutant(
        name="parallel_branches_are_summed_twice",
        bug="attention's part of a parallel block is summed over ranks, and then again with the MLP's",
        file="parallel/tensor/linear.py",
        before="first, *rest = (layer.product(alone, inputs, activation)",
        after="first, *rest = (layer.product(tp if layer is summands[0][0] and not tp.sequence_parallel else alone, "
        "inputs, activation)",
        test=LAYOUT("falcon,tp=2,pp=2,1f1b"),
    ),
    Mutant(
        name="llama3_scales_short_wavelengths",
        bug="Llama 3.1's rule divides the frequencies that it should keep, and keeps those that it should divide",
        file=ROTARY,
        before="return rates * ((1 - kept) / scaling.factor + kept)",
        after="return rates * (kept / scaling.factor + (1 - kept))",
        test=SCALED("llama3"),
    ),
    Mutant(
        name="yarns_ramp_is_not_whole",
        bug="YaRN's ramp begins and ends between two channels",
        file=ROTARY,
        before="    if scaling.truncate:\n        first, last = math.floor(first), math.ceil(last)\n",
        after="",
        test=SCALED("yarn"),
    ),
    Mutant(
        name="longrope_takes_the_short_list",
        bug="texts longer than the original length are rotated by the list for short ones",
        file=ROTARY,
        before="scaling.long_factor if seq > scaling.original_length",
        after="scaling.long_factor if seq < 0",
        test=SCALED("longrope, long"),
    ),
    Mutant(
        name="rotary_channels_are_the_last",
        bug="a head that is rotated in part rotates its last channels",
        file=ROTARY,
        before="turned, kept = x[..., :width], x[..., width:]",
        after="kept, turned = x.split([x.shape[-1] - width, width], -1)",
        test=ATTENDS("rotary in part, interleaved-0.0"),
    ),
    Mutant(
        name="every_block_has_the_window",
        bug="blocks of full attention have the window too",
        file="learning/models/gpt.py",
        before='mine = window if kind == "window" else None',
        after="mine = window",
        test="exchange/test_exchange_families.py::test_gradients_equal_those_of_transformers[gemma3]",
    ),
    Mutant(
        name="parallel_mlp_reads_attentions_norm",
        bug="with two norms the MLP reads the first one's output",
        file=BLOCK,
        before="(self.norm1(x), self.norm2(x))",
        after="(self.norm1(x), self.norm1(x) + 0 * self.norm2(x))",
        test="exchange/test_exchange_families.py::test_gradients_equal_those_of_transformers[gpt_neox parallel]",
    ),
    Mutant(
        name="embedding_is_not_multiplied",
        bug="the token embedding's factor is forgotten",
        file=EMBED,
        before="        if self.multiplier != 1:",
        after="        if self.multiplier != self.multiplier:",
        test="exchange/test_exchange_families.py::test_gradients_equal_those_of_transformers[gemma3]",
    ),
    Mutant(
        name="latents_enter_without_a_sum",
        bug="latents of keys and values have the gradient of this rank's heads alone",
        file=LATENT,
        before="both = copy_to_tp_region(torch.cat([self.kv_down_norm(latent), shared], -1), self.tp)",
        after="both = torch.cat([self.kv_down_norm(latent), shared], -1)",
        test=LAYOUT("deepseek,tp=2,pp=2,1f1b"),
    ),
    Mutant(
        name="matrices_to_latents_learn_from_a_ranks_positions",
        bug="under sequence parallelism each rank keeps its own part of the gradient of the matrices on the way down",
        file="parallel/tensor/replicated.py",
        before="std=std, partial=self.tp.sequence_parallel)",
        after="std=std)",
        says="attention.query_down.weight",
        test=LAYOUT("deepseek,tp=4,sp,cp=2"),
    ),
    Mutant(
        name="values_keep_the_zeros_at_their_ends",
        bug="of a head the last channels are taken, zeros among them, not those of the value",
        file=LATENT,
        before="[..., : self.value_dim]",
        after="[..., -self.value_dim :]",
        test=ATTENDS("latents-0.0"),
    ),
)
