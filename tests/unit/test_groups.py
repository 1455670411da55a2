"""Groups of the optimizer join at their step, and gradients are clipped to a limit."""

import pytest
import torch

from roots_dist.config.sections import OptimConfig
from roots_dist.parallel.optim.groups import Group, adamw, groups_joining, state_of
from roots_dist.parallel.optim.norm import clip_factor
from roots_dist.parallel.optim.trainable import Trainable


def test_a_group_joins_at_the_step_that_it_is_trained_from():
    found = {f"blocks.{step}": Trainable(from_step=step) for step in (0, 10, 20)}
    for step in (0, 10, 20):
        joining = groups_joining(found, step, step)
        assert [(group.trainable.from_step, group.decays) for group in joining] == [(step, True), (step, False)]
        assert not groups_joining(found, step + 1, step + 9)


def test_gradients_are_clipped_to_the_limit_and_never_enlarged():
    """Pascanu et al. 2013, section 3.2. A limit of 0 is none."""
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.5, 1.0) == clip_factor(0.0, 1.0) == clip_factor(1e9, 0.0) == 1.0


def test_a_number_is_stepped_to_the_same_bits_wherever_its_tensor_ends():
    """DeepSpeed puts parameters end to end and cuts them anywhere, the copies of a tied one otherwise on each stage."""
    numbers, *gradients = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))

    def stepped(sizes: list[int]) -> torch.Tensor:
        parts = [torch.nn.Parameter(part.clone()) for part in numbers[: sum(sizes)].split(sizes)]
        optimizer = adamw(OptimConfig())
        optimizer.add_param_group({"params": parts, "group": Group(Trainable(scale=0.5), decays=True), "lr": 1e-3})
        for gradient in gradients:
            for part, of_part in zip(parts, gradient[: sum(sizes)].split(sizes)):
                part.grad = of_part.clone()
            optimizer.step()
        states = [state_of(optimizer, part) for part in parts]
        moments = (torch.cat([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq"))
        assert {float(state["step"]) for state in states} == {3.0}
        return torch.stack([torch.cat([part.detach() for part in parts]), *moments])

    whole = stepped([1000])
    for sizes in ([37], [63, 1, 5], [8, 16, 3, 500]):
        assert torch.equal(stepped(sizes), whole[:, : sum(sizes)])
