"""The sections of a config and the tree of them: typed, frozen, unknown keys refused.

    sections.py --schema.py--> Config, which derives other values

One class per section. What most users never touch is under `advanced`. Nothing here reads a file or imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from roots_dist.config.checkpoint import CheckpointConfig
from roots_dist.config.extensions import or_extended
from roots_dist.config.finetune import FinetuneConfig
from roots_dist.config.lr_schedules import LR_SCHEDULES
from roots_dist.config.model import GeneratorConfig, ModelConfig
from roots_dist.config.objectives import OBJECTIVES, ObjectiveName
from roots_dist.config.optimizers import OPTIMIZERS
from roots_dist.config.parallel import ParallelConfig
from roots_dist.config.section import Section

if TYPE_CHECKING:
    LrScheduleName = str
    OptimizerName = str
else:  # a name added to a table is a value of the key
    LrScheduleName, OptimizerName = Literal[tuple(LR_SCHEDULES)], Literal[tuple(OPTIMIZERS)]


class ObjectiveConfig(Section):
    name: Annotated[ObjectiveName, or_extended("objectives")] = Field(
        "clm",
        description="; ".join(
            f"{kind}: {', '.join(f'{r.name} {r.title}' for r in OBJECTIVES.values() if bool(r.rows) == rows)}"
            for kind, rows in (("pre-training", False), ("fine-tuning", True))
        ),
    )
    reset_at_documents: bool = Field(False, description="clm: attention and positions begin anew with each document")
    mask_probability: float = Field(0.15, gt=0, lt=1, description="mlm, rtd, spans: share of tokens to be predicted")
    mask_replace_probability: float = Field(0.8, ge=0, le=1, description="mlm: of these, shown as the mask token")
    random_replace_probability: float = Field(
        0.1, ge=0, le=1, description="mlm: of these, shown as a random token; the rest as they are"
    )
    whole_word_mask: bool = Field(False, description="mlm: all tokens of a word are masked, or none")
    mean_span_length: float = Field(3.0, ge=1, description="spans: mean length of a masked span")
    discriminator_weight: float = Field(50.0, gt=0, description="rtd: weight of the discriminator's loss")
    dpo_beta: float = Field(0.1, gt=0, description="dpo: how far the model may leave the one that it starts from")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
    z_loss: float = Field(0.0, ge=0, description="weight of log²(Z), which keeps logits from drifting")
    balance_loss: float = Field(
        0.0,
        ge=0,
        description="weight of what uneven use of model.experts costs: 1 where even, mean of sequences and layers",
    )
    router_z_loss: float = Field(
        0.0, ge=0, description="weight of log²(Z) of the router of model.experts, mean of tokens and layers"
    )


class Source(Section):
    path: str = Field(description="prefix of a .bin/.idx pair")
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the other sources")

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


def _several(value: object) -> object:
    """One source or a list of them, as a tuple of them."""
    if isinstance(value, (str, dict, Source)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class DataConfig(Section):
    train: tuple[Source, ...] = Field((), description="prefixes made by `roots prepare`, or by Megatron")
    validation: tuple[Source, ...] = Field((), description="held-out prefixes; none: no evaluation")
    tokenizer: str | None = Field(None, description="tokenizer.json, for samples and generation")
    seq_length: int = Field(256, ge=1, le=1 << 24, description="tokens per sample (t5: of the encoder)")
    target_seq_length: int | None = Field(
        None, ge=1, description="tokens of the decoder; default: seq_length (spans: follows from it)"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return value | {k: _several(value[k]) for k in ("train", "validation") if k in value}


class ExactConfig(Section):
    """Degrees up to which the layout cannot matter."""

    tensor: int = Field(1, ge=1, description="a power of two: the largest parallel.tp")
    data: int = Field(1, ge=1, description="a power of two: the largest number of data ranks")
    context: int = Field(1, ge=1, description="a power of two: the largest parallel.cp")


class TrainConfig(Section):
    steps: int = Field(100, ge=1, description="optimizer steps of the whole run")
    global_batch: int = Field(8, ge=1, le=1 << 20, description="sequences per step over the whole world")
    micro_batch: int = Field(1, ge=1, description="sequences per forward pass of one rank")
    batch_ramp: tuple[int, int, int] | None = Field(
        None,
        description=(
            "[start, increment, samples]: the batch grows from start by increment to train.global_batch over samples"
        ),
    )
    seed: int = Field(1234, ge=0, le=2**63 - 1, description="of initial weights, sample order and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps master weights and moments in fp32")
    exact: ExactConfig | None = Field(
        None,
        description="{tensor: 8, data: 8, context: 2}: loss, gradients, weights and moments are equal to the bit in "
        "every layout whose tp divides the first, whose dp the second and whose cp the third (docs/exact.md)",
    )
    recheck_every: int = Field(
        0,
        ge=0,
        description="steps after which a microbatch of each data rank is computed again on the next one: its loss and "
        "gradients must have the same bits (train.exact); 0: never",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="computed again in backward: none: a gated activation; selective: any activation, and scores that "
        "no fused kernel computes; full: whole blocks",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="norms, rotary positions, gated activations, dropout and the loss are compiled by torch.compile "
        "(docs/performance.md); auto: on a GPU where that works",
    )
    spike_threshold: float | None = Field(
        None,
        gt=0,
        description="a step is not taken whose loss is above the median of the last 64 by this many times their spread",
    )
    norm_spike_threshold: float | None = Field(
        None, gt=0, description="the same of the norm of its gradient, before clipping"
    )
    on_spike: Literal["skip", "rewind"] = Field(
        "skip",
        description="rewind: the run also goes back to its newest checkpoint and leaves out the samples read since",
    )
    nonfinite: Literal["stop", "skip"] = Field("stop", description="what a NaN or inf in loss or gradient does")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_sequences: int = Field(64, ge=1, le=2**63 - 1, description="validation sequences per evaluation")
    sample_every: int = Field(0, ge=0, description="steps between printed samples of text; 0: only at the end")


class OptimConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), or a rule of an extension. Biases and norms are not decayed."""

    optimizer: Annotated[OptimizerName, or_extended("optimizers")] = Field(
        "adamw", description="rule of a step; others are extensions (docs/extensions.md)"
    )
    lr: float = Field(3e-4, gt=0, description="learning rate at its highest")
    min_lr: float = Field(0.0, ge=0, description="where decay ends")
    lr_schedule: Annotated[LrScheduleName, or_extended("lr_schedules")] = Field(
        "cosine", description="learning rate after warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_steps: int | None = Field(
        None, ge=1, description="steps of decay; default: to train.steps (wsd: the last 20 %)"
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled, of matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(1e-8, gt=0, description="added to the root of that mean")
    router_bias_rate: float = Field(
        1e-3, gt=0, description="what a step adds to, or takes from, each model.router_bias"
    )
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: no clipping")


class TrackConfig(Section):
    folder: str = Field("runs/default", description="everything the run writes")
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online if a key is set, offline if not, nothing if wandb is not installed"
    )
    tensorboard: Literal["auto", "on", "off"] = Field(
        "auto", description="event files in the run's folder; auto: on where the package tensorboard is installed"
    )
    project: str = Field("roots", description="project of W&B")
    group: str | None = Field(None, description="runs of W&B that belong together, as those of a sweep")
    name: str | None = Field(None, description="name of the run; default: the folder's")
    tags: tuple[str, ...] = Field((), description="tags of the run in W&B")
    artifacts: bool = Field(
        False,
        description="each checkpoint is an artifact in W&B, by reference: no byte is sent; without W&B nothing",
    )

    @field_validator("tensorboard", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        """YAML reads on and off as true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class AdvancedConfig(Section):
    """Keys that most runs never need."""

    engine: Literal["reference", "deepspeed"] = Field(
        "reference", description="who sums over dp, shards and steps: ZeRO 0 to 3 in readable PyTorch, or DeepSpeed"
    )
    float64: bool = Field(False, description="float64 everywhere, for proofs (reference engine)")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance in norms")
    sinusoidal_init: bool = Field(
        False, description="learned positions begin as sinusoids, so that neighbours are near at once"
    )
    grad_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="with train.precision=bf16: dtype in which gradients are summed over microbatches and data ranks; "
        "bf16 takes half the bytes",
    )
    vocab_multiple: int = Field(128, ge=1, description="the vocabulary is padded to a multiple of this, in any layout")
    loss_chunk: int | None = Field(
        None,
        ge=1,
        description="tokens whose logits exist at one time; default: as many as the projection is wide, so that logits "
        "take what its gradient takes, but at least 1,024, and more only within 2 GiB",
    )
    timeout_s: int = Field(600, ge=1, description="seconds that ranks wait for one another; then the hang is named")
    init_timeout_s: int | None = Field(None, ge=1, description="the same until all ranks have met; default: timeout_s")
    evaluate_timeout_s: int | None = Field(
        None, ge=1, description="the same in evaluations and samples; default: timeout_s"
    )
    save_timeout_s: int | None = Field(None, ge=1, description="the same in checkpoints; default: timeout_s")
    check_copies_every: int = Field(
        100, ge=0, description="steps between comparisons of all copies of weights and moments; 0: only before a save"
    )
    differing_copies: Literal["stop", "heal"] = Field(
        "stop", description="what copies that differ do; heal: they are overwritten with those of most ranks"
    )
    reduce_bucket: int = Field(50_000_000, ge=1, description="elements per gradient bucket of DeepSpeed")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per process; default: OMP_NUM_THREADS, else cores / local processes"
    )
    extensions: tuple[str, ...] = Field(
        (),
        description="Python files whose objectives, families, activations, schedules, optimizers and readers are "
        "added: code that is run (docs/extensions.md)",
    )
    track_ranks: bool = Field(False, description="memory and seconds of every rank too, so that a slow one is seen")


class ConfigTree(Section):
    """Every section with its keys. Use schema.py's Config."""

    model: ModelConfig = ModelConfig()
    generator: GeneratorConfig = GeneratorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    advanced: AdvancedConfig = AdvancedConfig()

    def value(self, name: str) -> object:
        """The value of `section.key`."""
        section, key = name.split(".")
        return getattr(getattr(self, section), key)
