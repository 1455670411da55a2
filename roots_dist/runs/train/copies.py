"""Compare the copies that ranks hold of the same numbers, by digests: weights and moments over tensor, data and context
ranks, and tied parameters over stages. What differs is never saved.

    weights, engine.read_state --digest--> int64 --MAX of (d, ~d) over each axis--> equal, or first parameter and ranks
                           all that differ --heal--> broadcast what is judged from most ranks, write_state

Copies are updated by each rank for itself and must stay equal to the bit: a bit that flips, or a rank that skips
clipping, lets them drift apart for weeks, and no loss curve shows it. Sharded numbers have no copy to compare.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist.assembly.run import Run
from roots_dist.cluster_profile import format_ranges
from roots_dist.errors import UserError
from roots_dist.parallel.zero.seam import STATE
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param
from roots_dist.world.words import words_of

log = logging.getLogger(__name__)

KINDS = ("weight in use", *STATE)
BLOCK = 1 << 15
"""Bytes whose words of eight are summed: the order of these words does not change a digest."""
MIX = -7046029254386353131
"""Odd number (splitmix64's increment), so that blocks have different weights."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HEALINGS = 3
"""Comparisons in a row that may find something to heal: one heals all that it finds."""


class CopiesDiffer(UserError):
    """Copies of one parameter are not equal on all ranks that hold it."""


@dataclass(frozen=True)
class CopyDifference:
    """A parameter whose copies of one kind differ."""

    name: str
    kind: str
    """One of KINDS."""
    wrong: tuple[int, ...]
    """Ranks whose copy is not that of most."""
    right: tuple[int, ...]
    """Ranks that agree with most others of the same slice. Empty if there is no majority."""

    def __str__(self) -> str:
        ranks = f"rank{'s' * (len(self.wrong) > 1)} {format_ranges(self.wrong)}"
        if not self.right:
            return f"the copies of {self.name} ({self.kind}) on {ranks} differ"
        return f"the copy of {self.name} ({self.kind}) on {ranks} is not that of ranks {format_ranges(self.right[:64])}"


@torch.no_grad()
def check_copies(run: Run, step: int) -> None:
    """Compare all copies after `step` steps. If some differ, raises CopiesDiffer on every rank, or with
    advanced.differing_copies=heal overwrites them with those of most ranks. Collective over the world."""
    if run.mesh.world.size == 1:
        return
    stop = run.config.advanced.differing_copies == "stop"
    for _ in range(HEALINGS):
        found = list(islice(differences(run), 1 if stop else None))
        if not found:
            return
        if stop or not found[-1].right:
            fix = "resume from the newest checkpoint, whose copies were equal, and check the memory of that rank's node"
            more = "" if found[-1].right else " (there is no majority to heal from)"
            raise CopiesDiffer(f"step {step}: {found[-1]}{more}. Fix: {fix}.")
        more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
        log.warning("step %d: %s%s: overwritten with the copies of most", step, found[0], more)
        heal(run, found)
    raise CopiesDiffer(f"step {step}: {found[0]}, healed {HEALINGS} times in vain. Fix: resume from a checkpoint.")


def digest(tensor: Tensor) -> Tensor:
    """An int64 of a tensor's bits, on its device: another one if any single bit is flipped. Reads the tensor once."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(INTEGERS[flat.element_size()])
    per_block = BLOCK // flat.element_size()
    whole = bits.numel() - bits.numel() % per_block
    if flat.data_ptr() % 8:
        bits = bits.clone()  # words of eight bytes, which are summed without a conversion, begin at multiples of eight
    blocks = bits[:whole].view(torch.int64).view(-1, BLOCK // 8).sum(1)
    blocks = torch.cat([blocks, bits[whole:].sum(dtype=torch.int64).view(1)])
    weights = torch.arange(1, 2 * len(blocks), 2, device=bits.device) * MIX  # odd: each is a bijection of 64 bits
    return (blocks * weights).sum()


def differences(run: Run) -> Iterator[CopyDifference]:
    """All differences among copies, equal on all ranks and in the same order. All numbers are read once, before the
    first. Ends with one that has no majority, because then nothing is healed. Collective over the world."""
    in_use = {p.name: weight for p, weight in run.engine.weights()}
    digests = torch.stack([torch.stack(list(_digests(run, p, in_use[p.name]))) for p in run.params])
    differs = torch.zeros_like(digests, dtype=torch.bool)
    for of_expert in (False, True):
        rows = [row for row, p in enumerate(run.params) if p.spec.of_expert == of_expert]
        differs[rows] = _differs(run.mesh.holders(of_expert), digests[rows])
    differs |= _differs_over_tp(run, digests)
    for axis, rows in _tied(run):
        differs[rows] |= _differs(axis, digests[rows])
    while run.mesh.world.sum_(differs.any().to(torch.int64)):
        yield (found := _who(run, digests, differs))
        if not found.right:
            return
        for row, p in enumerate(run.params):
            if p.name == found.name:
                differs[row, KINDS.index(found.kind)] = False


def _digests(run: Run, p: Param, in_use: Tensor) -> Iterator[Tensor]:
    """Digests of what this rank holds of a parameter, in the order of KINDS; 0 for what has no copy here. in_use: the
    weight in use."""
    none = torch.zeros((), dtype=torch.int64, device=run.mesh.device)
    in_parts = run.config.parallel.zero_stage >= 3 and run.mesh.dp_cp.size > 1
    yield none if in_parts else digest(in_use)
    is_whole = run.config.parallel.zero_stage == 0 or run.mesh.replica.size > 1
    data_copies = is_whole and run.mesh.holders(p.spec.of_expert).size > 1
    state = run.engine.read_state(p.name) if data_copies or p.replicas > 1 or p.name in run.ties else {}
    yield from (digest(state[kind]).to(run.mesh.device) if kind in state else none for kind in STATE)


def _differs(axis: Axis, digests: Tensor) -> Tensor:
    """True for each digest that is not equal on all ranks of an axis."""
    if axis.size == 1 or not digests.numel():
        return torch.zeros_like(digests, dtype=torch.bool)
    largest, smallest = _extremes(axis, torch.stack([digests, ~digests]))
    return torch.ne(largest, ~smallest)


def _extremes(axis: Axis, both: Tensor) -> Tensor:
    """The largest of each number over the axis; of ~x, that is ~ of the smallest x."""
    dist.all_reduce(both, dist.ReduceOp.MAX, group=axis.group)
    return both


def _differs_over_tp(run: Run, digests: Tensor) -> Tensor:
    """The same over tensor ranks, for parameters of which several hold the same slice."""
    tp, differs = run.mesh.tp, torch.zeros_like(digests, dtype=torch.bool)
    held = [(row, p) for row, p in enumerate(run.params) if p.replicas > 1]
    if not held:
        return differs
    lowest = torch.iinfo(torch.int64).min
    places = [torch.full((p.spec.num_shards(tp), 2, len(KINDS)), lowest, device=digests.device) for _, p in held]
    for place, (row, p) in zip(places, held):
        place[p.spec.shard_index(tp)] = torch.stack([digests[row], ~digests[row]])
    together = _extremes(tp, torch.cat(places)).split([len(place) for place in places])
    for place, (row, p) in zip(together, held):
        largest, smallest = place[p.spec.shard_index(tp)]
        differs[row] = largest != ~smallest
    return differs


def _tied(run: Run) -> Iterator[tuple[Axis, list[int]]]:
    """Each axis of tied parameters, and the rows of its parameters in an order that all its ranks share."""
    rows = {p.name: row for row, p in enumerate(run.params)}
    axes = {axis.ranks: axis for axis in run.ties.values()}
    for ranks in sorted(axes):
        yield axes[ranks], [rows[name] for name in sorted(run.ties) if run.ties[name].ranks == ranks]


def _who(run: Run, digests: Tensor, differs: Tensor) -> CopyDifference:
    """Agree on the first difference of the lowest rank that sees one, and on who is right."""
    world, mesh = run.mesh.world, run.mesh
    row, kind = divmod(int(differs.flatten().to(torch.int64).argmax()), len(KINDS))
    rows = torch.zeros(world.size, 2, dtype=torch.int64, device=mesh.device)
    rows[world.rank] = torch.stack([differs.any().to(torch.int64), torch.tensor(kind, device=mesh.device)])
    told = world.sum_(rows).tolist()
    first = next(rank for rank, (sees_one, _) in enumerate(told) if sees_one)
    name, kind = words_of(world, first, run.params[row].name, mesh.device), told[first][1]
    mine = next((row for row, p in enumerate(run.params) if p.name == name), None)
    table = torch.zeros(world.size, 2, dtype=torch.int64, device=mesh.device)
    if mine is not None:
        p = run.params[mine]
        table[world.rank] = torch.stack([torch.tensor(1 + p.spec.shard_index(p.tp)).to(digests), digests[mine, kind]])
    wrong, right = majority([(int(shard), int(found)) for shard, found in world.sum_(table).tolist()])
    return CopyDifference(name, KINDS[kind], wrong, right)


def majority(table: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks that are wrong, and those that are right: more than half of the ranks with the same slice. `table`: slice
    (0: none held) and digest of each rank. Without a majority all that hold a slice whose copies differ are wrong."""
    wrong: list[int] = []
    right: list[int] = []
    decided = True
    for shard in sorted({shard for shard, _ in table} - {0}):
        ranks = [rank for rank, (its, _) in enumerate(table) if its == shard]
        (most, count), *_ = Counter(table[rank][1] for rank in ranks).most_common()
        if 2 * count > len(ranks):
            right += [rank for rank in ranks if table[rank][1] == most]
            wrong += [rank for rank in ranks if table[rank][1] != most]
        else:
            decided = False
            wrong += ranks
    return tuple(sorted(wrong)), tuple(sorted(right)) if decided else ()


def heal(run: Run, found: Sequence[CopyDifference]) -> None:
    """Overwrite the copies that differ by those of a rank that is right, axis by axis, and nothing else: a rank that is
    right about one kind has not been judged about another. Collective over the world."""
    held = {p.name: p for p in run.params}
    for name in dict.fromkeys(one.name for one in found):
        if name in held:
            _heal_parameter(run, held[name], [one for one in found if one.name == name])
    run.engine.finish_loading(run.engine.optimizer_steps)


def _heal_parameter(run: Run, p: Param, differences: Sequence[CopyDifference]) -> None:
    mesh, state = run.mesh, run.engine.read_state(p.name)
    judged = {one.kind: one for one in differences}
    if KINDS[0] in judged:  # the weight in use is made anew from the master weight
        judged.setdefault(STATE[0], judged.pop(KINDS[0]))
    for kind in sorted(judged):
        found = judged[kind]
        is_right = mesh.rank in found.right
        for axis in (mesh.tp if p.replicas > 1 else None, mesh.holders(p.spec.of_expert), run.ties.get(p.name)):
            if axis is not None and axis.size > 1:
                is_right = _spread(axis, p, state, kind, is_right, mesh)
    run.engine.write_state(p.name, state)


def _spread(axis: Axis, p: Param, state: dict[str, Tensor], kind: str, is_right: bool, mesh: Mesh) -> bool:
    """Give one kind of state of a rank that is right to the others of the axis with the same slice. Returns whether
    this rank is right now. Collective over the axis."""
    shards, mine = p.spec.num_shards(p.tp), p.spec.shard_index(p.tp)
    first = torch.full((shards,), axis.size, device=mesh.device)
    if is_right:
        first[mine] = axis.rank
    dist.all_reduce(first, dist.ReduceOp.MIN, group=axis.group)
    for shard, source in enumerate(first.tolist()):
        if source == axis.size:
            continue
        received = state[kind].to(mesh.device).contiguous().clone()
        dist.broadcast(received, axis.ranks[source], group=axis.group)
        if shard == mine:
            state[kind] = received
    return is_right or first[mine].item() < axis.size
