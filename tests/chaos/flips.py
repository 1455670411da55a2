"""One bit of a weight, a moment or a gradient flips on one rank. If the number has copies on other ranks, the next
comparison must name the parameter and the rank, or heal it, and nothing may be saved in between."""

from __future__ import annotations

import random
import re
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
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

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


def config_of(case: str, differing: str = "stop") -> Config:
    small = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "vocab": 61},
            "data": {"seq_length": 8},
            "train": {"global_batch": 8, "device": "cpu"},
            "advanced": {"engine": "reference", "differing_copies": differing},
        }
    )
    return small.changed(CASES[case][1])


def flip(tensor: Tensor, draw: random.Random) -> None:
    """Flip one bit, in place."""
    bits = tensor.detach().view(-1).view(INTEGERS[tensor.element_size()])
    bits[draw.randrange(bits.numel())] ^= 1 << draw.randrange(8 * tensor.element_size() - 1)


def has_copies(run: Run, p: Param, what: str) -> bool:
    """Whether other ranks hold the same number."""
    whole = not run.engine.sharded  # type: ignore[attr-defined] # of the reference
    over_dp = run.mesh.dp_cp.size > 1 and (whole or what == "weight in use")
    return p.replicas > 1 or p.name in run.ties or over_dp


def harmed(rank: int, size: int, case: str, what: str, seed: int, differing: str, before: bool) -> dict[str, Any]:
    """Three steps, a flip on one rank before or after the second, and what the comparison says after each."""
    draw = random.Random(seed)
    config, layout = config_of(case, differing), CASES[case][0]
    run = build_run(config, Mesh.connect(layout, rank), objective=proof_objective(config))
    victim, number = draw.randrange(size), draw.randrange(1 << 30)
    said: list[str] = []
    shared, name = True, ""

    def harm(when: str) -> None:
        nonlocal shared, name
        masters = run.engine.masters  # type: ignore[attr-defined] # of the reference
        copied = [p for p in run.params if has_copies(run, p, what) and masters[p.name].master.numel()]
        shared = bool(copied)
        if rank != victim or not copied or when != ("gradient" if what == "gradient" else "state"):
            return
        p = copied[number % len(copied)]
        name = p.name
        if what == "gradient":
            flip(run.engine.masters[p.name].gradient, draw)  # type: ignore[attr-defined]
        else:
            master = run.engine.masters[p.name]  # type: ignore[attr-defined]
            flip(master.master if what == "weight" else master.state[what], draw)

    for step in range(3):
        batches = random_batches(config, step, run.mesh.dp.rank, run.mesh.dp.size)
        if step == 1:
            if before:
                harm("state")
            summed = run.engine.accumulate
            if what == "gradient":
                run.engine.accumulate = _then(summed, lambda: harm("gradient"))  # type: ignore[method-assign]
        try:
            train_step(run, batches, 1e-2)
        except NotFiniteError as error:  # the bit made a number infinite, and the step has said so
            said.append(f"not finite: {error}")
            break
        run.engine.accumulate = type(run.engine).accumulate.__get__(run.engine)  # type: ignore[method-assign]
        if step == 1 and not before:
            harm("state")
        try:
            check_copies(run, step + 1)
            said.append("")
        except CopiesDiffer as error:
            said.append(str(error))
            break
    equal = not list(differences(run))
    return {"said": said, "equal": equal, "shared": shared, "victim": victim, "name": name}


def _then(accumulate: Any, after: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def both() -> Any:
        with accumulate():
            yield
        after()

    return both


def trial(draw: random.Random, place: Path) -> Outcome:
    case, what = draw.choice(list(CASES)), draw.choice(WHAT)
    differing, before = draw.choice(("stop", "heal")), what != "gradient" and draw.random() < 0.3
    found = on_warm_world(SIZE, harmed, case, what, draw.randrange(1 << 30), differing, before)
    kind = f"a bit of a {what}{' before a step' * before}: {differing}"
    victim = found[0]["victim"]
    words = f"{case}, rank {victim}: {found}"
    if not found[victim]["name"]:
        return Outcome(f"a bit of a {what} without copies", held=all(f["equal"] for f in found), words=words)
    if what == "gradient" and all(f["equal"] and not any(f["said"]) for f in found):
        return Outcome("a bit of a gradient that no moment keeps", held=True)
    if differing == "heal" and all(f["equal"] for f in found):
        return Outcome(kind, held=True)
    last = found[0]["said"][-1]
    named = all(f["said"] == found[0]["said"] for f in found) and len(found[0]["said"]) == 2
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
