"""All mutants, in the order of their areas."""

from __future__ import annotations

from .context import CONTEXT
from .data import DATA
from .exact import EXACT
from .experts import EXPERT_MUTANTS
from .extensions import EXTENSIONS
from .features import FEATURES
from .imports import IMPORTS
from .loop import RUNS
from .losses import LOSSES
from .models import MODELS
from .mutant import Mutant
from .optimizer import OPTIMIZER
from .pipeline import PIPELINE
from .proof import PROOF
from .randomness import RANDOMNESS
from .ranks import RANKS
from .storage import STORAGE
from .tensor import TENSOR
from .tiles import TILE_MUTANTS

AREAS: dict[str, tuple[Mutant, ...]] = {
    "Tensor and sequence parallelism": TENSOR,
    "Context parallelism": CONTEXT,
    "Attention without masks": TILE_MUTANTS,
    "Pipelines": PIPELINE,
    "Layers and families": MODELS,
    "Features of some families": FEATURES,
    "Experts": EXPERT_MUTANTS,
    "Random numbers": RANDOMNESS,
    "Losses": LOSSES,
    "Optimizer and ZeRO": OPTIMIZER,
    "The same bits": EXACT,
    "Data and objectives": DATA,
    "Runs": RUNS,
    "Checkpoints": STORAGE,
    "Imported models": IMPORTS,
    "Extensions and the kit for layers": EXTENSIONS,
    "Ranks among each other": RANKS,
    "The proof itself": PROOF,
}
MUTANTS: dict[str, Mutant] = {mutant.name: mutant for area in AREAS.values() for mutant in area}
assert len(MUTANTS) == sum(map(len, AREAS.values())), "two mutants have one name"
SAMPLE = (
    "row_output_is_summed_twice",
    "padded_words_have_probability",
    "z_loss_gradient_is_halved",
)
"""The mutants that every run of the suite plants. The first one is noticed where layouts are compared, the others where
something independent is."""
