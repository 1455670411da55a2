"""The model families. MODELS maps model.family to a function (config, tp) -> the model's pieces, in order."""

from collections.abc import Callable
from dataclasses import replace

from roots_dist.config.schema import Config
from roots_dist.learning.models import bert, electra, gpt, t5
from roots_dist.learning.models.lora import with_adapters
from roots_dist.learning.models.pieces import PieceSpec
from roots_dist.parallel.tensor.collectives import TensorParallel

MODELS: dict[str, Callable[[Config, TensorParallel], tuple[PieceSpec, ...]]] = {
    "gpt": gpt.pieces,
    "bert": bert.pieces,
    "electra": electra.pieces,
    "t5": t5.pieces,
}


def pieces_of(config: Config, tp: TensorParallel) -> tuple[PieceSpec, ...]:
    """The pieces of the config's model, with LoRA adapters if it is fine-tuned with them."""
    added = config.extension.families.get(config.model.family)
    if added:  # what it makes of our pieces, ours do not know: none is taken for another
        specs = tuple(replace(spec, kind=None) for spec in added.pieces(config, tp))
    else:
        specs = MODELS[config.model.family](config, tp)
    return with_adapters(specs, config.finetune) if config.finetune.strategy == "lora" else specs
