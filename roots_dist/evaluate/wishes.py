"""What `roots evaluate` is asked for besides the loss of held-out text. No torch: the command line makes it."""

from __future__ import annotations

from dataclasses import dataclass

from roots_dist.config.schema import Config
from roots_dist.errors import Problem


@dataclass(frozen=True)
class Wishes:
    answers: int = 64
    """Generative tasks: held-out questions that are answered; 0: none."""
    ngram: int | None = None
    """Order of the n-gram baseline."""
    ngram_tokens: int = 20_000_000
    """Of the training text, at most, that the baseline is made from."""
    tasks: tuple[str, ...] = ()
    """Of EleutherAI's lm-evaluation-harness."""
    include_path: str | None = None
    """Folder of task descriptions, instead of those that lm-eval brings."""
    limit: int | None = None
    """Examples of each task, at most."""

    def problems(self, config: Config) -> list[Problem]:
        """What cannot be had of this run."""
        found, objective = [], f"a run of {config.objective.name}"
        if self.ngram is not None and config.objective.name != "clm":
            expected = "a causal run (objective.name=clm), whose loss an n-gram model can be compared with"
            found.append(Problem(key="--ngram", found=objective, expected=expected, fix="leave it out"))
        elif self.ngram is not None and not config.data.train:
            fix = "name it: data.train=data/mine/train_text_document"
            found.append(Problem(key="data.train", found=[], expected="the text that the n-gram baseline learns from", fix=fix))
        if self.tasks and config.objective.name not in ("clm", "instruct"):
            expected = "a decoder that writes (objective.name=clm or instruct)"
            found.append(Problem(key="--lm-eval", found=objective, expected=expected, fix="leave it out"))
        elif self.tasks and config.data.tokenizer is None:
            fix = "name it: data.tokenizer=data/mine/tokenizer.json"
            found.append(Problem(key="data.tokenizer", found=None, expected="the run's tokenizer: tasks are texts", fix=fix))
        for key, value in (("--include-path", self.include_path), ("--limit", self.limit)):
            if value is not None and not self.tasks:
                found.append(Problem(key=key, found=value, expected="tasks to go with it", fix="add --lm-eval TASKS"))
        if not config.data.validation and (self.ngram is not None or not self.tasks):
            fix = "name a prefix: roots evaluate RUN data.validation=data/mine/validation_text_document"
            found.append(Problem(key="data.validation", found=[], expected="a held-out corpus", fix=fix))
        return found
