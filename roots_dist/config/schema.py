"""The config: the tree of sections.py, and what follows from it by functions. No field is written back.

    YAML + overrides --load.py--> Config --checks.py--> a run that can start

Nothing here reads a file, but for extensions, or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from roots_dist.config.extensions import AnyName, Extension, extended, pinned
from roots_dist.config.problems import as_argument, put_values, validated
from roots_dist.config.sections import ConfigTree

NO_CHANGES: Mapping[str, object] = MappingProxyType({})


class Config(ConfigTree):
    """All keys of a run."""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Config:
        """The config of a tree of plain values, with the names that its extensions add. Raises ValidationError."""
        files = (tree.get("advanced") or {}).get("extensions") if isinstance(tree.get("advanced"), Mapping) else None
        return cls.model_validate(tree, context=extended(tuple(pinned(files))))

    @classmethod
    def from_record(cls, tree: Mapping[str, Any]) -> Config:
        """The config that a checkpoint recorded, whatever names its extensions have added: they are not run."""
        return cls.model_validate(tree, context=AnyName())

    @property
    def extension(self) -> Extension:
        """Additions of the files of advanced.extensions to the tables. Look names up with config/records.py."""
        return extended(self.advanced.extensions)

    def changed(self, values: Mapping[str, object] = NO_CHANGES, /, **names: object) -> Config:
        """The same config with some values replaced, by `section.key`. Keys and single values are checked as those of a
        file; what values mean for each other is checked when a run is opened. Raises ConfigError, also for `names`,
        which have no sections."""
        tree = self.model_dump(mode="json")
        problems = [*put_values(tree, values), *map(as_argument, names, names.values())]
        return validated(Config, tree, extended(tuple(pinned(tree["advanced"]["extensions"]))), {}, problems)

    def padded_vocab(self) -> int:
        """The same in every layout, so that initial weights and loss are too."""
        multiple = self.advanced.vocab_multiple
        return -(-self.model.vocab // multiple) * multiple

    def num_stages(self) -> int:
        return self.parallel.pp * self.parallel.virtual_stages

    def num_microbatches(self, dp: int, batch: int | None = None) -> int:
        """Microbatches of one rank in a step of `batch` sequences (default: the full batch)."""
        return (batch or self.train.global_batch) // (self.train.micro_batch * dp)

    def keeps_best(self) -> bool:
        """True if the checkpoint of the best evaluation is kept: the run fine-tunes, or may stop early."""
        return bool(self.data.validation) and (self.finetune.init_from is not None or self.finetune.patience > 0)

    def saves_in_background(self) -> bool:
        """True if checkpoints are written while training goes on: there are some before the last one."""
        return self.checkpoint.asynchronous and (self.checkpoint.every > 0 or self.keeps_best())
