"""Answers to names of other systems whose values mean something else here, or nothing.

    warmup_ratio, 0.1, train.steps=100 --advice_for--> "write optim.warmup_steps=10: that is 0.1 × train.steps, ..."

A name that stands for the same value as a key is in other_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roots_dist.config.overrides import number_meant

Known = Mapping[str, object]
"""Values of a config, by key, as far as they are known."""
Answer = Callable[[object], str | None]
"""The fix for a value; None if its name needs no words of its own then."""
PRECISION, ZERO, RECOMPUTE = "train.precision", "parallel.zero_stage", "train.recompute"


@dataclass(frozen=True)
class Converted:
    """A name elsewhere whose number becomes that of `key` by other keys: times all of `times`, over all of `over`."""

    key: str
    times: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    factor: int = 1
    is_whole: bool = True

    def advice(self, name: str, found: object, known: Known) -> str:
        given = None if isinstance(found, bool) else number_meant(found, whole=False)
        number, sizes = float(given or 0), [known.get(key) for key in (*self.times, *self.over)]
        is_share = self.times == ("train.steps",)
        if given is None or number < 0 or (is_share and number > 1) or None in sizes:
            return f"write {self.key}=N, where N is {self._formula(name, [*self.times, *self.over])}"
        result = number * self.factor
        for size in map(float, map(str, sizes[: len(self.times)])):
            result *= size
        for size in map(float, map(str, sizes[len(self.times) :])):
            result /= size
        shown = str(max(1, round(result)) if result else 0) if self.is_whole else f"{result:g}"
        first = str(int(number)) if number.is_integer() else given
        formulas = dict.fromkeys(self._formula(first, words) for words in ([*self.times, *self.over], sizes))
        return f"write {self.key}={shown}, which is {' = '.join(formulas)}"

    def _formula(self, first: str, sizes: Sequence[object]) -> str:
        words = list(map(str, sizes))
        product = " × ".join([first, *([str(self.factor)] if self.factor > 1 else []), *words[: len(self.times)]])
        divisor = " × ".join(words[len(self.times) :])
        return product + (f" / ({divisor})" if len(self.over) > 1 else f" / {divisor}" if divisor else "")


_STEP = ("train.global_batch",)
_TOKENS = ("train.global_batch", "data.seq_length")
CONVERTED: dict[str, Converted] = {
    **dict.fromkeys(
        ("warmup_ratio", "lr_warmup_ratio", "lr_warmup_fraction", "warmup_fraction", "warmup_proportion", "pct_start"),
        Converted("optim.warmup_steps", times=("train.steps",)),
    ),
    **dict.fromkeys(
        ("min_lr_ratio", "min_lr_rate", "lr_min_ratio"), Converted("optim.min_lr", times=("optim.lr",), is_whole=False)
    ),
    **dict.fromkeys(("train_samples", "max_samples"), Converted("train.steps", over=_STEP)),
    **dict.fromkeys(
        ("train_tokens", "max_tokens", "total_tokens", "num_train_tokens", "max_train_tokens"),
        Converted("train.steps", over=_TOKENS),
    ),
    "lr_warmup_samples": Converted("optim.warmup_steps", over=_STEP),
    "lr_decay_samples": Converted("optim.decay_steps", over=_STEP),
    **dict.fromkeys(("warmup_tokens", "lr_warmup_tokens"), Converted("optim.warmup_steps", over=_TOKENS)),
    **dict.fromkeys(
        ("tokens_per_batch", "tokens_per_step"), Converted("train.global_batch", over=("data.seq_length",))
    ),
    **dict.fromkeys(("eval_iters", "eval_batches"), Converted("train.eval_sequences", times=_STEP)),
    "distributed_timeout_minutes": Converted("advanced.timeout_s", factor=60),
}
"""Name -> the key that it becomes, and how its number does."""
SHARES = dict.fromkeys(("optim.warmup_steps", "checkpoint.every", "train.eval_every", "train.log_every"), "train.steps")
"""Keys that count steps, where transformers takes a share of the run too: a number between 0 and 1."""


def is_on(found: object) -> bool | None:
    """True or false as a switch is written: true, {enabled: true}, "auto"; None if it is something else."""
    if isinstance(found, Mapping):
        return is_on(found.get("enabled", True))
    return {"true": True, "1": True, "auto": True, "yes": True, "false": False, "0": False, "no": False}.get(
        str(found).lower()
    )


def _switch(on: str, off: str) -> Answer:
    """Answer for a switch that is on (or has another value), and about one that is off."""
    return lambda found: off if is_on(found) is False else on


def _always(fix: str) -> Answer:
    return lambda found: fix


def _zero_optimization(found: object) -> str:
    stage = found.get("stage", 0) if isinstance(found, Mapping) else found
    others = [str(key) for key in found if key != "stage"] if isinstance(found, Mapping) else []
    left = f"; leave out {', '.join(others)}, for which there is no key" if others else ""
    is_stage = isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= 3
    return f"write {ZERO}={stage if is_stage else 'STAGE, one of 0, 1, 2, 3'}{left}"


def _fsdp(found: object) -> str:
    stage = {"shard_grad_op": 2, "no_shard": 0}.get(str(found).lower().split(" ")[0], 3)
    return f"write {ZERO}={stage}"


def _deepspeed(found: object) -> str | None:
    """A section of keys is answered key by key."""
    return (
        None
        if isinstance(found, Mapping)
        else (
            "write advanced.engine=deepspeed; what its file says is said by keys here: train.micro_batch, "
            f"{PRECISION}, {ZERO}, optim.clip_grad"
        )
    )


def _report_to(found: object) -> str:
    words = {"tensorboard": "track.tensorboard=on", "wandb": "track.wandb=online"}
    return f"write {words.get(str(found).lower(), 'track.wandb=disabled track.tensorboard=off')}"


def _betas(found: object) -> str:
    given = found.strip("[]() ").split(",") if isinstance(found, str) else found
    pair = given if isinstance(given, (list, tuple)) and len(given) == 2 else ("VALUE", "VALUE")
    return f"write optim.beta1={str(pair[0]).strip()} optim.beta2={str(pair[1]).strip()}"


ACCUMULATION = "leave it out: it follows from train.global_batch / (train.micro_batch × data ranks)"
_BF16 = _switch(f"write {PRECISION}=bf16", f"leave it out: without it {PRECISION}=fp32")
_FP16 = _switch(
    f"write {PRECISION}=bf16, which needs no scaling of the loss: there is no fp16 here",
    f"leave it out: there is no fp16 here, only {PRECISION}=fp32 or bf16",
)
_SCALING = _always(f"leave it out: {PRECISION} is fp32 or bf16, which need no scaling of the loss")
_STRATEGY = _always("leave it out: checkpoint.every, train.eval_every and train.log_every count steps")


def _resume(found: object) -> str:
    """A run goes on by itself; elsewhere it is told to, or from where."""
    if found is None or (switched := is_on(found)) is True:
        return "leave it out: a run goes on from the newest checkpoint of its track.folder"
    if switched is False:
        return "write checkpoint.resume=false"
    return f"write track.folder={found}: a run goes on from the newest checkpoint of its folder"


ANSWERS: dict[str, Answer] = {
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "gradient_accumulation",
            "grad_accumulation_steps",
            "grad_accum_steps",
            "accumulate_grad_batches",
            "accumulation_steps",
            "num_microbatches",
            "num_micro_batches",
        ),
        _always(ACCUMULATION),
    ),
    **dict.fromkeys(("bf16", "bf16.enabled", "bfloat16", "use_bf16"), _BF16),
    **dict.fromkeys(("fp16", "fp16.enabled", "float16", "half_precision", "amp", "use_fp16"), _FP16),
    **dict.fromkeys(("loss_scale", "initial_loss_scale", "initial_scale_power", "loss_scale_window"), _SCALING),
    **dict.fromkeys(("zero_optimization", "zero_optimization.stage", "zero"), _zero_optimization),
    "fsdp": _fsdp,
    "use_distributed_optimizer": _switch(f"write {ZERO}=1", f"write {ZERO}=0"),
    "untie_embeddings_and_output_weights": _switch(
        "write model.tied_embeddings=false", "write model.tied_embeddings=true"
    ),
    "disable_bias_linear": _switch("write model.bias=false", "write model.bias=true"),
    "add_bias_linear": _switch("write model.bias=true", "write model.bias=false"),
    "recompute_activations": _switch(f"write {RECOMPUTE}=selective", f"write {RECOMPUTE}=none"),
    "checkpoint_activations": _switch(f"write {RECOMPUTE}=full", f"write {RECOMPUTE}=none"),
    **dict.fromkeys(("recompute_method", "recompute_num_layers"), _always(f"leave it out, and write {RECOMPUTE}=full")),
    "partition_activations": _always(f"leave it out: {RECOMPUTE} computes activations again, and none is moved"),
    "use_rotary_position_embeddings": _switch("write model.positions=rotary", "write model.positions=learned"),
    "swiglu": _switch("write model.activation=swiglu", "leave it out: model.activation names the function"),
    "group_query_attention": _always("leave it out, and write model.kv_heads=N"),
    "use_flash_attn": _always("leave it out: a fused kernel is used wherever there is one"),
    "attn_implementation": _always("leave it out: a fused kernel is used wherever there is one"),
    **dict.fromkeys(
        ("use_cpu", "no_cuda"), _switch("write train.device=cpu", "leave it out, or write train.device=cuda")
    ),
    "resume": _resume,
    "overwrite_output_dir": _switch("write checkpoint.resume=false", "leave it out: a run resumes its checkpoints"),
    **dict.fromkeys(("save_strategy", "eval_strategy", "evaluation_strategy", "logging_strategy"), _STRATEGY),
    **dict.fromkeys(
        ("do_train", "do_eval", "dataloader_num_workers", "num_workers", "remove_unused_columns"),
        _always("leave it out: there is nothing to set"),
    ),
    "report_to": _report_to,
    **dict.fromkeys(
        ("num_gpus", "n_gpu", "gpus", "nproc_per_node", "num_processes", "world_size"),
        _always("leave it out, and write --processes N on the command line"),
    ),
    "split": _always("leave it out: data.train and data.validation name a corpus each (`roots prepare` parts a text)"),
    "betas": _betas,
    **dict.fromkeys(("deepspeed", "deepspeed_config"), _deepspeed),
}
"""Name, or the last two parts of a dotted one -> what to do, by its value."""


def advice_for(name: str, found: object, known: Known) -> str | None:
    """The fix for a name of another system, whatever section is before it; None if it needs no words of its own.

    `found`: its value, None if it is not known. `known`: values of the config by key, for numbers of another unit.
    """
    *outer, leaf = name.lstrip("-").replace("-", "_").lower().split(".")
    for word in (".".join([*outer[-1:], leaf]), leaf):
        if word in CONVERTED:
            return CONVERTED[word].advice(word, found, known)
        if word in ANSWERS:
            return ANSWERS[word](found)
    return None


def share_of(key: str, found: object, known: Known) -> str | None:
    """The fix for a share of the run where a key counts steps, also as a percentage; None if it is none."""
    if isinstance(found, str) and found.strip().endswith("%"):
        found = float(number_meant(found, whole=False) or 0)
    is_share = key in SHARES and isinstance(found, float) and 0 < found < 1
    return Converted(key, times=(SHARES[key],)).advice(key, found, known) if is_share else None
