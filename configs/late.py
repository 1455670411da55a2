"""An extension, told in docs/extensions.md."""

import types

import numpy as np
from torch import nn

from roots_dist import Extension, LrSchedule, NewObjective, NewOptimizer, ObjectiveRecord, Schedule
from roots_dist.learning.objectives.clm import CausalTokens
from roots_dist.schedule.schedules import gpipe
from roots_dist.world.batch import IGNORE


class LateTokens(CausalTokens):
    """Next tokens, of which the first half of each sample is only read."""

    perplexity_term = "late"  # the term of the loss is called as the objective
    weights = types.MappingProxyType({perplexity_term: 1.0})

    def sample(self, source, index: int, draw: np.random.Generator):
        fields = super().sample(source, index, draw)
        targets = fields["targets"].astype(np.int64)
        targets[: len(targets) // 2] = IGNORE
        return fields | {"targets": targets}


def squared_relu(x):  # (So et al. 2021)
    return nn.functional.relu(x).square()


def inverse_root(optim, steps):
    return lambda step: optim.lr * (max(1, optim.warmup_steps) / (step + 1)) ** 0.5


def heavy_ball(step, weight, gradient, exp_avg, exp_avg_sq):  # (Polyak 1964)
    exp_avg.mul_(step.optim.beta1).add_(gradient)
    weight.mul_(1 - step.lr * step.weight_decay).sub_(exp_avg, alpha=step.lr)


EXTENSION = Extension(
    objectives={
        "late": NewObjective(
            record=ObjectiveRecord(name="late", title="the second half", families=("gpt",), answer="write"),
            make=LateTokens,
        )
    },
    activations={"squared_relu": squared_relu},
    schedules={"all-at-once": Schedule(title="All at once", actions=gpipe)},
    lr_schedules={"inverse_root": LrSchedule(after_warmup=inverse_root)},
    optimizers={"heavy_ball": NewOptimizer(update=heavy_ball, reads=frozenset({"beta1", "weight_decay"}))},
)
