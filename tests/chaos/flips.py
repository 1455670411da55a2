"""One bit of a weight, a moment or a gradient flips on one rank. If the number has copies on other ranks, the next
comparison must name the parameter and the rank, or heal it, and nothing may be saved in between. Twice: in the readable
engine, and in DeepSpeed's."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from roots_dist.assembly.run import Run, build_run
from roots_dist.config.schema import Config
from roots_dist.errors import NotFiniteError
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.copies import INTEGERS, CopiesDiffer, check_copies, differences
from roots_dist.runs.train.step import train_step
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, ParamTensor

from .trial import Family, Outcome

SIZE = 4
CASES: dict[str, tuple[Layout, dict[str, object]]] = {
    "tp4": (Layout(tp=4), {"parallel.tp": 4}),
    "tp2 sp dp2 zero0": (
        Layout(tp=2, dp=2),
        {"parallel.tp": 2, "parallel.sequence_parallel": True, "parallel.zero_stage": 0},
    ),
    **{
        f"tp2 dp2 zero{zero}": (Layout(tp=2, dp=2), {"parallel.tp": 2, "parallel.zero_stage": zero})
        for zero in (1, 2, 3)
    },
    "pp2 dp2 zero0": (Layout(pp=2, dp=2), {"parallel.pp": 2, "parallel.zero_stage": 0}),
    "tp2 pp2": (Layout(tp=2, pp=2), {"parallel.tp": 2, "parallel.pp": 2}),
    "dp4 zero0": (Layout(dp=4), {"parallel.zero_stage": 0}),
}
WHAT = ("weight", "exp_avg", "exp_avg_sq", "gradient")
DEEPSPEED: dict[str, tuple[Layout, dict[str, object]]] = {
    f"{name} zero{zero}": (layout, {**changes, "parallel.zero_stage": zero, "advanced.engine": "deepspeed"})
    for name, layout, changes in (
        ("tp2 dp2", Layout(tp=2, dp=2), {"parallel.tp": 2}),
        ("tp4", Layout(tp=4), {"parallel.tp": 4}),
        ("pp2 dp2", Layout(pp=2, dp=2), {"parallel.pp": 2}),
        ("dp4", Layout(dp=4), {}),
    )
    for zero in range(4)
}
"""The same for DeepSpeed. In dp4 under ZeRO 3 no rank holds what another does."""
IN_USE = "weight in use"
"""What the model computes with, where its master copy is another tensor."""


def config_of(case: str, differing: str = "stop") -> Config:
    small = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "vocab": 61},
            "data": {"seq_length": 8},
            "train": {"global_batch": 8, "device": "cpu"},
            "advanced": {"engine": "reference", "differing_copies": differing},
        }
    )
    return small.changed({**CASES, **DEEPSPEED}[case][1])


def flip(tensor: Tensor, draw: random.Random) -> None:
    """Flip one bit, in place."""
    bits = tensor.detach().view(-1).view(INTEGERS[tensor.element_size()])
    bits[draw.randrange(bits.numel())] ^= 1 << draw.randrange(8 * tensor.element_size() - 1)


def has_copies(run: Run, p: Param, what: str) -> bool:
    """Whether other ranks hold the same number."""
    zero = run.config.parallel.zero_stage
    if run.config.advanced.engine == "deepspeed" and what == "gradient":  # it flips before data ranks sum it
        return p.replicas > 1 or p.name in run.ties
    over_dp = run.mesh.dp_cp.size > 1 and (zero == 0 or (what == IN_USE and zero < 3))
    in_parts = what == IN_USE and zero == 3 and run.mesh.dp_cp.size > 1
    return over_dp or (not in_parts and (p.replicas > 1 or p.name in run.ties))


def held(run: Run, p: Param, what: str) -> Tensor:
    """What this rank holds of a parameter, to be changed in place; nothing where it holds no part of it."""
    if what == IN_USE:
        return next(tensor for q, tensor in run.engine.weights() if q.name == p.name)
    if run.config.advanced.engine == "reference":
        master = run.engine.masters[p.name]  # type: ignore[attr-defined] # of the reference
        return {"weight": master.master, **master.state}[what]
    if run.config.parallel.zero_stage in (1, 2):
        mapping: Any = p.tensor._hp_mapping  # type: ignore[attr-defined] # of DeepSpeed
        return Tensor() if mapping is None else mapping.get_hp_fragment(None if what == "weight" else what)
    return run.engine.state._parts(p)[what]  # type: ignore[attr-defined] # of DeepSpeed's engine


def after_gradients(run: Run, harm: Callable[[Param, Tensor], None]) -> None:
    """Call `harm` once with each parameter's gradient, when the ranks that hold parts of it have summed it."""
    if run.config.advanced.engine == "deepspeed":  # before the sum over data ranks, which spreads it evenly

        def once(found: Iterable[ParamTensor]) -> None:
            run.engine.on_gradients = None
            for p, gradient in found:
                harm(p, gradient)

        run.engine.on_gradients = once
        return
    real = run.engine.accumulate

    @contextmanager
    def both() -> Any:
        run.engine.accumulate = real  # type: ignore[method-assign]
        with real():
            yield
        for p in run.params:
            harm(p, run.engine.masters[p.name].gradient)  # type: ignore[attr-defined] # of the reference

    run.engine.accumulate = both  # type: ignore[method-assign]


def harmed(rank: int, size: int, case: str, what: str, seed: int, differing: str, before: bool) -> dict[str, Any]:
    """Three steps, a flip on one rank before or after the second, and what the comparison says after each."""
    draw = random.Random(seed)
    config, layout = config_of(case, differing), {**CASES, **DEEPSPEED}[case][0]
    run = build_run(config, Mesh.connect(layout, rank), objective=proof_objective(config))
    victim, number = draw.randrange(size), draw.randrange(1 << 30)
    said: list[str] = []
    copied = [p for p in run.params if has_copies(run, p, what)]
    if what != "gradient":
        copied = [p for p in copied if held(run, p, what).numel()]
    elif config.advanced.engine == "reference":
        copied = [p for p in copied if run.engine.masters[p.name].master.numel()]  # type: ignore[attr-defined]
    name = copied[number % len(copied)].name if copied and rank == victim else ""

    def harm(p: Param, tensor: Tensor) -> None:
        if p.name == name:
            flip(tensor, draw)

    def harm_state() -> None:
        for p in run.params:
            if p.name == name:
                harm(p, held(run, p, what))

    for step in range(3):
        batches = random_batches(config, step, run.mesh.dp.rank, run.mesh.dp.size)
        if step == 1 and before:
            harm_state()
        if step == 1 and what == "gradient":
            after_gradients(run, harm)
        try:
            train_step(run, batches, 1e-2)
        except NotFiniteError as error:  # the bit made a number infinite, and the step has said so
            said.append(f"not finite: {error}")
            break
        if step == 1 and not before and what != "gradient":
            harm_state()
        try:
            check_copies(run, step + 1)
            said.append("")
        except CopiesDiffer as error:
            said.append(str(error))
            break
    equal = not list(differences(run))
    return {"said": said, "equal": equal, "victim": victim, "name": name}


def trial(draw: random.Random, place: Path) -> Outcome:
    case, what = draw.choice(list(CASES)), draw.choice(WHAT)
    differing, before = draw.choice(("stop", "heal")), what != "gradient" and draw.random() < 0.3
    found = on_warm_world(SIZE, harmed, case, what, draw.randrange(1 << 30), differing, before)
    return judged(case, what, differing, before, found)


def in_deepspeed(draw: random.Random, place: Path) -> Outcome:
    case, what = draw.choice(list(DEEPSPEED)), draw.choice((*WHAT, IN_USE))
    differing, before = draw.choice(("stop", "heal")), what not in ("gradient", IN_USE) and draw.random() < 0.3
    found = on_world(SIZE, harmed, case, what, draw.randrange(1 << 30), differing, before)
    return judged(case, what, differing, before, found)


def judged(case: str, what: str, differing: str, before: bool, found: list[dict[str, Any]]) -> Outcome:
    """What came of a flip. Where no other rank holds the number, nothing can notice it: that is counted apart."""
    kind = f"a bit of a {what}{' before a step' * before}: {differing}"
    victim = found[0]["victim"]
    words = f"{case}, rank {victim}: {found}"
    if not found[victim]["name"]:
        nothing = all(f["equal"] and not any(f["said"]) for f in found)
        return Outcome(f"no flip: no other rank holds a {what}", held=nothing, words=words)
    if what == "gradient" and all(f["equal"] and not any(f["said"]) for f in found):
        return Outcome("a bit of a gradient that no moment keeps", held=True)
    if differing == "heal" and all(f["equal"] for f in found):
        return Outcome(kind, held=True)
    last = found[0]["said"][-1]
    named = all(f["said"] == found[0]["said"] for f in found) and len(found[0]["said"]) == 2
    if what == "gradient" and named and "norm of all ranks' gradients together is not finite" in last:
        equal = all(f["equal"] for f in found)
        return Outcome("a bit of a gradient that makes the norm infinite, and no step is taken", equal, words)
    return Outcome(
        kind, held=named and _names(last, victim) and (differing == "stop" or "no majority" in last), words=words
    )


def _names(said: str, victim: int) -> bool:
    """Whether the rank is named, alone or, where there is no majority, among others."""
    who = re.search(r"on ranks? ([\d, -]+)", said)
    if who is None:
        return False
    ranks: set[int] = set()
    for part in who[1].strip().split(", "):
        first, _, last = part.partition("-")
        ranks |= set(range(int(first), int(last or first) + 1))
    return victim in ranks and (ranks == {victim} or "no majority" in said)


FAMILY = Family(
    "flips",
    harm="one bit of a weight, moment or gradient that other ranks hold too flips on one rank, in eight layouts",
    promise="it is noticed after that step and, before it has spread, named with its rank, or healed from most ranks",
    trial=trial,
    sample=2,
)
DEEPSPEED_FAMILY = Family(
    "deepspeed",
    harm="one bit of a weight (the master copy, or the one in use), moment or gradient that other ranks hold too flips "
    "on one rank of DeepSpeed's ZeRO 0 to 3, in sixteen layouts. What ZeRO has cut over data ranks (from stage 1 on "
    "master weights and moments, in stage 3 all weights) is held once among them: only tensor ranks and the stages of "
    "a tied embedding have copies to compare, and a bit of anything else is noticed by nothing here",
    promise="it is noticed after that step and named with its rank, or healed from most ranks",
    trial=in_deepspeed,
    sample=0,
)
