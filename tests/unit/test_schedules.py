"""A schedule is the one of its paper: its picture, its order, its bubble, its peak; and a broken one is found out."""

import ast
import importlib
import inspect
import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import simulated_violations

from roots_dist.errors import UserError
from roots_dist.schedule import draw
from roots_dist.schedule.actions import Action, Kind, rank_of, results
from roots_dist.schedule.check import InvalidProgram, Times, play
from roots_dist.schedule.communication import (
    COMPUTE,
    RECEIVES,
    SENDS,
    channel_of,
    directions,
    neighbours,
    other_end,
    with_communication,
)
from roots_dist.schedule.program import complete, rank_program, refusal, whole_program
from roots_dist.schedule.schedules import (
    SCHEDULES,
    Shape,
    expected_bubble,
    expected_peak,
    gpipe,
    make,
    problem,
)
from roots_dist.schedule.violations import violations

PACKAGE = Path(draw.__file__).parents[1]
ONE_CHUNK = [name for name, schedule in SCHEDULES.items() if not schedule.virtual_stages]
CHUNKED = [name for name in SCHEDULES if name not in ONE_CHUNK]


KEEP_ALL = {"gpipe"}
"""Schedules that hold every microbatch at once, as it is."""


def near(program, rank, chunks=1):
    """What a rank looks at: itself and its neighbours."""
    return {r: program[r] for r in (rank, *neighbours(rank, len(program), len(program) * chunks))}


def by_rank(program, chunks=1):
    """What each rank makes of a compute-only program for itself: its actions and receipts."""
    ranks = len(program)
    return [complete(rank, near(program, rank, chunks), ranks, ranks * chunks) for rank in range(ranks)]


def communicating(program, chunks=1):
    return [found.actions for found in by_rank(program, chunks)]


def program_of(name, ranks, microbatches, chunks=1):
    return communicating(make(name, ranks, microbatches, chunks), chunks)


def rows(program):
    """As in the papers: one chunk, so the stage goes without saying."""
    return [" ".join(f"{a.kind.value}{a.microbatch}" for a in actions) for actions in program]


def shapes(most):
    """Every shape of at most so many forwards, fewer microbatches than ranks included."""
    for name in SCHEDULES:
        for chunks in range(2, 7) if SCHEDULES[name].virtual_stages else [1]:
            for ranks in range(1, most // chunks + 1):
                for microbatches in range(1, most // (ranks * chunks) + 1):
                    if problem(name, ranks, microbatches, chunks) is None:
                        yield name, ranks, microbatches, chunks


def with_every_pair(found):
    """Some of these shapes: every schedule and number of chunks still meets every number of ranks and microbatches."""
    shown = set()
    for shape in random.Random(7).sample(found, len(found)):
        name, ranks, microbatches, chunks = shape
        pairs = {(name, "ranks", ranks), (name, "microbatches", microbatches)}
        pairs |= {(chunks, "ranks", ranks), (chunks, "microbatches", microbatches)}
        if not pairs <= shown:
            shown |= pairs
            yield shape


def assert_as_in_the_paper(name, ranks, microbatches, chunks, times):
    shape = name, ranks, microbatches, chunks
    computes = make(*shape)
    assert violations(dict(enumerate(computes)), Shape(ranks, microbatches, chunks)) == [], shape
    program = communicating(computes, chunks)
    assert simulated_violations(program) == [], shape
    played = play(program, times)
    peak, bubble = expected_peak(*shape), expected_bubble(*shape, times)
    assert peak is None or played.peak == peak, shape
    assert bubble is None or played.bubble == pytest.approx(bubble, abs=1e-9), shape


# ── the schedules ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_1f1b_is_the_schedule_of_the_paper():
    assert rows(make("1f1b", 3, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_zb_h1_puts_weights_off_by_the_rank():
    assert rows(make("zb-h1", 3, 4)) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_picture_in_the_docstring_is_what_runs(name):
    """The picture says for which shape it is."""
    lines = map(str.strip, inspect.getdoc(SCHEDULES[name].actions).splitlines())
    pictured = [line for line in lines if line.startswith("rank")]
    forwards = {cell for line in pictured for cell in line.split() if cell.removeprefix("|").startswith("F")}
    numbers = {re.sub(r"\D", "", cell) for cell in forwards}
    chunks = len({re.sub(r"[|F\d]", "", cell) for cell in forwards})
    assert pictured == draw.to_text(play(program_of(name, len(pictured), len(numbers), chunks))).splitlines()


def test_a_record_says_whether_the_backward_is_split():
    """The planner runs on shapes alone what the record says."""
    for shape in shapes(most=40):
        kinds = {action.kind for actions in make(*shape) for action in actions}
        split = {Kind.FORWARD, Kind.INPUT, Kind.WEIGHT}
        assert kinds == (split if SCHEDULES[shape[0]].splits_backward else {Kind.FORWARD, Kind.BACKWARD}), shape


@pytest.mark.parametrize(
    "chosen, most",
    [(with_every_pair, 60), pytest.param(iter, 120, marks=pytest.mark.full)],
    ids=["every pair", "all"],
)
def test_thousands_of_shapes_have_the_order_peak_and_bubble_of_the_papers(chosen, most):
    draws = random.Random(7)
    found = list(shapes(most=most))
    assert len(found) > 10 * most
    for shape in chosen(found):
        times = Times(forward=draws.uniform(0.2, 3), input=draws.uniform(0.2, 3), weight=draws.uniform(0.2, 3))
        assert_as_in_the_paper(*shape, times)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ONE_CHUNK), st.integers(1, 20), st.integers(1, 40))
def test_larger_shapes_too(name, ranks, microbatches):
    assert_as_in_the_paper(name, ranks, microbatches, 1, Times(forward=1, input=1.1, weight=0.9))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CHUNKED), st.integers(1, 10), st.integers(1, 5), st.integers(2, 6))
def test_larger_shapes_with_chunks_too(name, ranks, groups, chunks):
    assert_as_in_the_paper(name, ranks, groups * ranks, chunks, Times(forward=1, input=1.1, weight=0.9))


def test_zero_bubble_loses_a_third_of_1f1b():
    for ranks in (2, 5, 12):
        ours, theirs = (play(program_of(name, ranks, 3 * ranks)).bubble for name in ("zb-h1", "1f1b"))
        assert ours == pytest.approx(theirs / 3)


def test_a_receipt_proves_that_a_send_has_arrived_and_few_sends_wait_for_theirs():
    """However long transfers take, and however many microbatches there are; gpipe keeps all of them anyway."""
    draws = random.Random(3)
    checked, worst = 0, (-math.inf, ())
    for shape in shapes(most=60):
        name, ranks, _, chunks = shape
        ours = by_rank(make(*shape), chunks)
        played = play(
            [found.actions for found in ours],
            Times(forward=draws.uniform(0.2, 3), weight=draws.uniform(0.2, 3), transfer=draws.uniform(0, 5)),
        )
        ends = {span.action: span.end for spans in played.transfers.values() for span in spans}
        for actions, proved in ours:
            waiting: set[Action] = set()
            most = 0
            for action in actions:
                if action.kind in SENDS:
                    waiting.add(action)
                most = max(most, len(waiting))
                arrival = Kind.RECV_FORWARD if action.kind is Kind.FORWARD else Kind.RECV_BACKWARD
                for send in proved.get(action._replace(kind=arrival), ()) if action.kind in COMPUTE else ():
                    assert ends[send] <= ends[other_end(action._replace(kind=arrival))], shape
                    waiting.discard(send)
                    checked += 1
            worst = max(worst, (most - 2 * ranks * chunks, shape)) if name not in KEEP_ALL else worst
    assert checked > 5000 and worst[0] <= 0, worst


def test_every_schedule_adds_gradients_up_in_the_same_order():
    for shape in shapes(most=40):
        added = {}
        for action in (action for actions in make(*shape) for action in actions):
            if action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                added.setdefault(action.stage, []).append(action.microbatch)
        assert set(map(tuple, added.values())) == {tuple(range(shape[2]))}


@pytest.mark.parametrize(
    "shape, words",
    [
        (("1f1b", 4, 8, 2), ["virtual stages = 2", "expected 1", "Fix"]),
        (("zb-h1", 4, 8, 2), ["virtual stages = 2", "zb-h1"]),
        (("interleaved", 4, 8, 1), ["virtual stages = 1", "at least 2", "1f1b"]),
        (("interleaved", 4, 6, 2), ["microbatches = 6", "multiple of the 4", "use 8"]),
        (("interleaved", 4, 2, 2), ["microbatches = 2", "use 4"]),
        (("2f2b", 4, 8, 1), ["schedule = '2f2b'", ", ".join(SCHEDULES)]),
        (("gpipe", 0, 8, 1), ["ranks = 0"]),
        (("gpipe", 4, -1, 1), ["microbatches = -1"]),
        (("interleaved", 4, 8, 0), ["virtual stages = 0"]),
    ],
)
def test_an_impossible_shape_is_refused_in_one_line(shape, words):
    with pytest.raises(UserError) as error:
        make(*shape)
    assert str(error.value) == problem(*shape)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


# ── an independent implementation ──────────────────────────────────────────────────────────────────────────────────


def orders_of_torch(schedule, ranks, microbatches, chunks):
    """The order of PyTorch's schedule classes, without the stages, groups and idle slots they want."""
    rounds = max(1, microbatches // ranks)
    shape = SimpleNamespace(
        n_local_stages=chunks, pp_group_size=ranks, _num_stages=ranks, _n_microbatches=microbatches,
        microbatches_per_round=microbatches // rounds,
    )  # fmt: skip
    if hasattr(schedule, "_calculate_single_rank_operations"):
        order = [schedule._calculate_single_rank_operations(shape, rank) for rank in range(ranks)]
    else:
        order = [schedule._get_pipeline_order(shape)[rank] for rank in range(ranks)]
    kinds = {"FORWARD": Kind.FORWARD, "FULL_BACKWARD": Kind.BACKWARD,
             "BACKWARD_INPUT": Kind.INPUT, "BACKWARD_WEIGHT": Kind.WEIGHT}  # fmt: skip
    return [
        [Action(kinds[a.computation_type.name], a.stage_index, a.microbatch_index)
         for a in actions if a is not None and a.computation_type.name in kinds]
        for actions in order
    ]  # fmt: skip


def test_the_orders_are_those_of_torch():
    theirs = importlib.import_module("torch.distributed.pipelining.schedules")
    for ranks in range(1, 7):
        for microbatches in range(ranks, 4 * ranks + 1):
            assert make("gpipe", ranks, microbatches) == orders_of_torch(theirs.ScheduleGPipe, ranks, microbatches, 1)
            # the last rank's order there begins with F1: a slip of its display, the class itself does not run it
            assert (
                make("1f1b", ranks, microbatches)[:-1]
                == orders_of_torch(theirs.Schedule1F1B, ranks, microbatches, 1)[:-1]
            )
            assert make("zb-h1", ranks, microbatches) == orders_of_torch(
                theirs.ScheduleInterleavedZeroBubble, ranks, microbatches, 1
            )
            for chunks in range(2, 5):
                if microbatches % ranks == 0:
                    assert make("interleaved", ranks, microbatches, chunks) == orders_of_torch(
                        theirs.ScheduleInterleaved1F1B, ranks, microbatches, chunks
                    )


# ── communication ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_communication_of_two_ranks_is_what_one_would_write():
    program = program_of("1f1b", 2, 2)
    assert [" ".join(map(str, actions)) for actions in program] == [
        "F0.0 sf0.0 rb0.0 F0.1 sf0.1 rb0.1 B0.0 B0.1",
        "rf1.0 F1.0 rf1.1 B1.0 sb1.0 F1.1 B1.1 sb1.1",
    ]


def test_both_ends_of_every_channel_agree_on_the_order():
    for shape in shapes(most=40):
        program, ranks = program_of(*shape), shape[1]
        ends = {}
        for actions in program:
            for action in actions:
                if action.kind in SENDS:
                    ends.setdefault(channel_of(action, ranks), ([], []))[0].append(other_end(action))
                elif action.kind in RECEIVES:
                    ends.setdefault(channel_of(action, ranks), ([], []))[1].append(action)
        assert all(given == taken for given, taken in ends.values()), shape
        assert {channel.direction for channel in ends} == set(directions(ranks, ranks * shape[3])), shape
        for channel in ends:
            assert channel.receiver in neighbours(channel.sender, ranks, ranks * shape[3]), shape
        assert ranks == 1 or all(c.sender != c.receiver for c in ends)


def channels(program):
    ranks = len(program)
    return {channel_of(action, ranks) for actions in program for action in actions if action.kind not in COMPUTE}


def test_channels_of_a_ring_wrap_around():
    found = channels(program_of("interleaved", 3, 3, 2))
    forward = {(c.sender, c.receiver) for c in found if c.kind is Kind.FORWARD}
    backward = {(c.sender, c.receiver) for c in found if c.kind is Kind.BACKWARD}
    assert forward == {(0, 1), (1, 2), (2, 0)} and backward == {(1, 0), (2, 1), (0, 2)}
    assert {(c.sender, c.receiver) for c in channels(program_of("1f1b", 3, 3))} == {(0, 1), (1, 2), (1, 0), (2, 1)}


def test_one_rank_sends_nothing():
    for name, chunks in [*((name, 1) for name in ONE_CHUNK), *((name, 3) for name in CHUNKED)]:
        assert program_of(name, 1, 5, chunks) == make(name, 1, 5, chunks)
        assert not channels(program_of(name, 1, 5, chunks)) and not directions(1, chunks)


def waited_for(computes, chunks):
    """For each result, how many actions of each rank must be done before it, directly or over other ranks."""
    ranks = len(computes)
    done, found = [0] * ranks, {}
    known = [dict.fromkeys(range(ranks), 0) for _ in range(ranks)]
    while any(done[r] < len(computes[r]) for r in range(ranks)):
        before = list(done)
        for r in range(ranks):
            while done[r] < len(computes[r]):
                action = computes[r][done[r]]
                forward, inner = action.kind is Kind.FORWARD, action.kind is not Kind.WEIGHT
                stage = action.stage - 1 if forward else action.stage + 1
                source = Action(Kind.FORWARD if forward else Kind.INPUT, stage, action.microbatch)
                if inner and 0 <= stage < ranks * chunks:
                    if source not in found:
                        break
                    known[r] = {rank: max(known[r][rank], found[source][rank]) for rank in range(ranks)}
                done[r] += 1
                known[r] = known[r] | {r: done[r]}
                found |= {result: dict(known[r]) for result in results(action)}
        assert done != before, "a deadlock"
    return found


def test_a_receive_is_posted_one_computation_early_unless_its_sender_waits_for_that():
    """A posted receive of NCCL is a kernel that spins. With GPipe, the one of the first gradient was posted before the
    last forward, for which its sender waits: an allocation that waited for the device there never ended."""
    for shape in with_every_pair(list(shapes(most=40))):
        computes, chunks = make(*shape), shape[3]
        needed = waited_for(computes, chunks)
        for rank, actions in enumerate(communicating(computes, chunks)):
            computed = [n for n, a in enumerate(actions) if a.kind not in SENDS + RECEIVES]
            for n, action in enumerate(actions):
                if action.kind in RECEIVES:
                    forward = action.kind is Kind.RECV_FORWARD
                    kinds = (Kind.FORWARD,) if forward else (Kind.BACKWARD, Kind.INPUT)
                    (use,) = (u for u in computed if actions[u][1:] == action[1:] and actions[u].kind in kinds)
                    earlier, ahead = sum(c < n for c in computed), sum(n < c < use for c in computed)
                    sent = Action(kinds[-1], action.stage + (-1 if forward else 1), action.microbatch)
                    assert needed[sent][rank] <= earlier, (shape, action)
                    assert ahead or use == computed[0] or needed[sent][rank] == earlier, (shape, action)


# ── the player ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_transfer_takes_time_and_overlaps_with_computing():
    times = Times(forward=1, input=1, weight=1, transfer=0.5)
    assert play(program_of("1f1b", 2, 1), times).makespan == 1 + 0.5 + (1 + 2) + 0.5 + 2
    steady = play(program_of("1f1b", 2, 50), times)
    assert steady.makespan < play(program_of("1f1b", 2, 50)).makespan + 50 * 2 * 0.5
    assert all(span.end - span.start == 0.5 for spans in steady.transfers.values() for span in spans)


def test_a_slow_stage_sets_the_pace():
    played = play(program_of("1f1b", 3, 40), Times(stages=(1, 1, 2)))
    assert played.ideal == 40 * 3 * 2 and played.bubble == pytest.approx((1 + 1 + 2 + 2) / (40 * 6))


def test_a_deadlock_names_what_each_rank_waits_for():
    f, b = Kind.FORWARD, Kind.BACKWARD
    orders = [[(f, 0), (b, 0), (f, 1), (b, 1)], [(f, 0), (f, 1), (b, 0), (b, 1)]]
    program = [[Action(kind, rank, i) for kind, i in order] for rank, order in enumerate(orders)]
    with pytest.raises(InvalidProgram) as error:
        play(communicating(program))
    assert str(error.value).splitlines() == [
        "deadlock:",
        "rank 0 waits at B0.0 for rb0.0",
        "rank 1 waits at F1.1 for rf1.1",
    ]


def deadlocking(rank, ranks, microbatches):
    """Rank 0 waits for a gradient before its second forward; the others want all forwards first."""
    if rank:
        return gpipe(rank, ranks, microbatches)
    return [
        action for pair in zip(gpipe(0, 1, microbatches), gpipe(0, 1, microbatches)[microbatches:]) for action in pair
    ]


def forgetful(rank, ranks, microbatches):
    """Every rank leaves out its first action."""
    return gpipe(rank, ranks, microbatches)[1:]


def test_a_program_that_deadlocks_is_refused_with_what_each_rank_waits_for(monkeypatch):
    """On rank 0 and on its neighbour, and where all ranks are looked at."""
    monkeypatch.setitem(SCHEDULES, "gpipe", replace(SCHEDULES["gpipe"], actions=deadlocking))
    waiting = "rank 0 waits at B0.0 for rb0.0, rank 1 waits at F1.1 for rf1.1"
    assert refusal("gpipe", Shape(2, 4)) == waiting
    for ranks in (2, 12):
        found = {rank: refusal("gpipe", Shape(ranks, 4), rank) for rank in [*range(ranks), None]}
        assert found == dict.fromkeys(range(2, ranks)) | dict.fromkeys([0, 1, None], waiting)
    assert refusal("gpipe", Shape(1, 4)) is None
    with pytest.raises(UserError, match=r"schedule = 'gpipe': .* 2 ranks and 4 microbatches; rank 0 waits .* Fix: "):
        whole_program("gpipe", 2, 4)
    with pytest.raises(UserError, match="rank 1 waits at F1.1 for rf1.1"):
        rank_program("gpipe", 1, Shape(12, 4))
    with pytest.raises(UserError, match="rank 1 waits at F1.1 for rf1.1"):
        draw.describe("gpipe", 2, 4)


def test_a_program_that_forgets_an_action_is_refused(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "gpipe", replace(SCHEDULES["gpipe"], actions=forgetful))
    assert "the forward of stage 0, microbatch 0 is computed 0 times" in refusal("gpipe", Shape(1, 2))
    assert "the forward of stage 7, microbatch 0 is computed 0 times" in refusal("gpipe", Shape(12, 2))
    assert refusal("gpipe", Shape(12, 2)).endswith("expected once and 4 more")
    for rank in (3, 4, 5):  # the one that forgets, and its neighbours
        only = replace(SCHEDULES["gpipe"], actions=lambda r, *shape: (forgetful if r == 4 else gpipe)(r, *shape))
        monkeypatch.setitem(SCHEDULES, "gpipe", only)
        line = "the forward of stage 4, microbatch 0 is computed 0 times, expected once"
        assert refusal("gpipe", Shape(12, 2), rank) == line


def test_a_tensor_that_nobody_uses_is_not_sent():
    with pytest.raises(InvalidProgram, match=r"^sf0.0 is sent, but nothing on rank 1 uses it$"):
        with_communication(1, {0: gpipe(0, 2, 2), 1: gpipe(1, 2, 2)[1:]}, 2, 2)


def test_a_schedule_without_closed_forms_is_drawn_without_them(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "zb-h1", replace(SCHEDULES["zb-h1"], bubble_time=None, peak=None))
    text = draw.describe("zb-h1", 4, 8)
    assert expected_bubble("zb-h1", 4, 8) is None and expected_peak("zb-h1", 4, 8) is None
    assert "bubble  12.5% of the ideal time, 11.1% of the whole (no closed form)" in text
    assert "4, 4, 4, 4 activations of a stage held at once, rank by rank (no closed form)" in text


MUTATED = [
    ("gpipe", 3, 3, 1),
    ("1f1b", 3, 4, 1),
    ("interleaved", 2, 4, 2),
    ("zb-h1", 3, 4, 1),
    ("interleaved", 1, 2, 2),
]


@pytest.mark.parametrize("shape", MUTATED, ids=str)
def test_dropping_or_doubling_any_action_is_found_by_the_simulator(shape):
    whole = program_of(*shape)
    for rank, actions in enumerate(whole):
        for n in range(len(actions)):
            for middle in ([], [actions[n]] * 2):
                broken = [*whole[:rank], actions[:n] + middle + actions[n + 1 :], *whole[rank + 1 :]]
                names = str(actions[n]), f"stage {actions[n].stage}, microbatch {actions[n].microbatch} is computed"
                assert any(name in line for line in simulated_violations(broken) for name in names), (
                    rank,
                    actions[n],
                    middle,
                )


@pytest.mark.parametrize("shape", MUTATED, ids=str)
def test_exchanging_two_ends_of_a_channel_is_found_by_the_simulator(shape):
    whole = program_of(*shape)
    for rank, actions in enumerate(whole):
        for kind in SENDS + RECEIVES:
            places = [n for n, a in enumerate(actions) if a.kind is kind]
            for a, b in itertools.pairwise(places):
                same = channel_of(actions[a], shape[1]) == channel_of(actions[b], shape[1])
                swapped = list(actions)
                swapped[a], swapped[b] = swapped[b], swapped[a]
                assert not same or simulated_violations([*whole[:rank], swapped, *whole[rank + 1 :]]), (
                    rank,
                    actions[a],
                )


@pytest.mark.parametrize("shape", MUTATED, ids=str)
def test_the_simulator_lets_nothing_come_before_what_it_needs(shape):
    whole = program_of(*shape)
    for rank, actions in enumerate(whole):
        for early in (Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT, *SENDS):
            for n in [n for n, a in enumerate(actions) if a.kind is early]:
                moved = [actions[n], *actions[:n], *actions[n + 1 :]]
                found = simulated_violations([*whole[:rank], moved, *whole[rank + 1 :]])
                assert any(line.startswith(f"rank {rank} runs {actions[n]} before") for line in found)


def assert_seen_from_near(program, shape, rank, told):
    """By the rank, by its neighbours, and by who looks at all ranks."""
    for one in (rank, *neighbours(rank, shape.ranks, shape.stages)):
        assert any(told in line for line in violations(near(program, one, shape.chunks), shape)), (rank, one, told)
    assert any(told in line for line in violations(dict(enumerate(program)), shape)), (rank, told)


@pytest.mark.parametrize("shape", MUTATED, ids=str)
def test_a_computation_that_is_dropped_doubled_or_too_early_is_found_by_its_rank_and_its_neighbours(shape):
    whole, shape = make(*shape), Shape(*shape[1:])
    for rank, actions in enumerate(whole):
        for n, action in enumerate(actions):
            for middle in ([], [action] * 2):
                broken = [*whole[:rank], actions[:n] + middle + actions[n + 1 :], *whole[rank + 1 :]]
                told = f"stage {action.stage}, microbatch {action.microbatch} is computed {len(middle)} times"
                assert_seen_from_near(broken, shape, rank, told)
            if action.kind is not Kind.FORWARD:
                moved = [action, *actions[:n], *actions[n + 1 :]]
                told = f"rank {rank} runs {action} before"
                assert_seen_from_near([*whole[:rank], moved, *whole[rank + 1 :]], shape, rank, told)


def test_work_on_the_wrong_rank_is_found():
    program = make("1f1b", 2, 2)
    found = violations(dict(enumerate(program[::-1])), Shape(2, 2))
    assert "rank 0 runs F1.0, but stage 1 lives on rank 1" in found
    assert "rank 0 runs F1.0, but stage 1 lives on rank 1" in simulated_violations(communicating(program)[::-1])
    assert all(rank_of(a.stage, 2) == r for r, actions in enumerate(program) for a in actions)


def test_work_that_the_shape_does_not_have_is_found():
    assert "rank 0 runs F0.2, which is no computation of this shape" in violations({0: gpipe(0, 1, 3)}, Shape(1, 2))
    before = [Action(Kind.FORWARD, 0, -1), *gpipe(0, 1, 2)]
    assert "rank 0 runs F0.-1, which is no computation of this shape" in violations({0: before}, Shape(1, 2))
    sending = [*gpipe(0, 1, 1), Action(Kind.SEND_FORWARD, 0, 0)]
    assert violations({0: sending}, Shape(1, 1)) == ["rank 0 runs sf0.0, which is no computation of this shape"]


def some_order(draws, rank, shape):
    """Some order of a rank's work in which nothing comes before what the rank itself must have done."""
    stages, ranks = range(rank, shape.stages, shape.ranks), shape.ranks
    left = {Action(kind, s, i) for kind in (Kind.FORWARD, Kind.BACKWARD) for s in stages for i in range(shape[1])}
    done = []
    while left:
        ready = [
            Action(kind, stage, i)
            for kind, stage, i in left
            if (kind, stage + (-ranks if kind is Kind.FORWARD else ranks), i) not in left
            if kind is Kind.FORWARD or (Kind.FORWARD, stage, i) not in left
        ]
        done.append(draws.choice(sorted(ready, key=str)))
        left.remove(done[-1])
    return done


@pytest.mark.parametrize("shape", [Shape(2, 3), Shape(3, 2), Shape(4, 2), Shape(2, 2, 2), Shape(3, 3, 2)], ids=str)
def test_neighbours_see_exactly_the_deadlocks_that_the_simulator_sees(shape):
    """With several stages on three ranks or more they may refuse more, never less."""
    draws = random.Random(11)
    count = Counter()
    for _ in range(200):
        orders = [some_order(draws, rank, shape) for rank in range(shape.ranks)]
        if draws.random() < 0.5:  # a schedule with a few neighbouring actions exchanged
            name = "interleaved" if shape.chunks > 1 else "1f1b"
            orders = [SCHEDULES[name].of_rank(rank, shape) for rank in range(shape.ranks)]
            for _ in range(draws.randint(0, 3)):
                actions = draws.choice(orders)
                n = draws.randrange(1, len(actions))
                actions[n - 1 : n + 1] = actions[n], actions[n - 1]
        seen = {line for rank in range(shape.ranks) for line in violations(near(orders, rank, shape.chunks), shape)}
        assert bool(seen) == bool(violations(dict(enumerate(orders)), shape)), orders
        count[bool(simulated_violations(communicating(orders, shape.chunks))), bool(seen)] += 1
    assert count[True, True] > 20 and count[False, False] > 20 and not count[True, False], count
    assert (count[False, True] > 0) == (shape.chunks > 1 and shape.ranks > 2), count


def test_a_circle_around_all_ranks_is_refused_though_no_two_neighbours_wait_for_each_other():
    """Rank 1 wants microbatch 1 first; rank 0 sends it only after chunk 1 of microbatch 0, which needs rank 1."""
    orders = ["F0.0 F3.0 F0.1 F3.1", "F1.1 F1.0 F4.1 F4.0", "F2.0 F2.1 F5.0 F5.1"]
    program = [
        [Action(Kind.FORWARD, int(word[1]), int(word[3])) for word in order.split()]
        + [Action(Kind.BACKWARD, chunk * 3 + rank, i) for chunk in (1, 0) for i in (0, 1)]
        for rank, order in enumerate(orders)
    ]
    assert "rank 0 waits at F3.0 for rf3.0" in simulated_violations(communicating(program, 2))
    found = violations(dict(enumerate(program)), Shape(3, 2, 2))
    assert "rank 0 runs F0.0 where rank 1 runs F1.1, not in one order of chunks" in found
    assert not any("waits" in line for line in found)


def test_one_warmup_too_few_is_valid_but_slower():
    right = make("1f1b", 4, 8)
    wrong = [[action._replace(stage=rank) for action in right[min(rank + 1, 3)]] for rank in range(4)]
    played = play(communicating(wrong))
    assert violations(dict(enumerate(wrong)), Shape(4, 8)) == simulated_violations(communicating(wrong)) == []
    assert played.bubble > expected_bubble("1f1b", 4, 8) and played.peak == [3, 2, 1, 1]


# ── the pictures ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_describe_tells_bubble_and_peak(tmp_path):
    text = draw.describe("1f1b", 4, 8, 1, tmp_path / "a.png")
    assert "1F1B: 4 ranks, 8 microbatches" in text
    assert "37.5% of the ideal time, 27.3% of the whole" in text and "4, 3, 2, 1 activations" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "0.0% of the ideal" in draw.describe("zb-h1", 1, 1)


def test_a_wide_picture_goes_on_below_and_loses_no_cell():
    played = play(program_of("interleaved", 2, 8, 2))
    wide, narrow = draw.to_text(played, width=10_000), draw.to_text(played, width=60)
    assert all(len(line) <= 60 for line in narrow.splitlines())
    for rank in ("rank 0 |", "rank 1 |"):
        parts = [line[len(rank) :].ljust(52) for line in narrow.splitlines() if line.startswith(rank)]
        assert " ".join("".join(parts).split()) == " ".join(
            next(line for line in wide.splitlines() if line.startswith(rank))[len(rank) :].split()
        )


def test_a_long_schedule_is_drawn_without_numbers():
    text = draw.describe("1f1b", 8, 200)
    assert "rank 7 |       FB-FB-FB-" in text and len(text.splitlines()) < 80


def test_describe_refuses_what_it_cannot_draw_or_write(tmp_path):
    with pytest.raises(UserError, match="expected at most 20000 to draw"):
        draw.describe("gpipe", 10_000, 10_000)
    with pytest.raises(UserError, match="png = .*No such file or directory.*Fix"):
        draw.describe("gpipe", 2, 2, 1, tmp_path / "none" / "a.png")
    with pytest.raises(UserError, match="expected one of"):
        draw.describe("gpipes", 2, 2)
    with pytest.raises(UserError, match="ranks = -5"):
        draw.describe("gpipe", -5, 2)


# ── one table ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_knows_a_schedule_by_its_name():
    """What depends on a schedule is said in its record."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "schedules.py":
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = [node.lineno for node in nodes if isinstance(node, ast.Constant) and node.value in SCHEDULES]
        assert not named, f"{path.name}:{named} names a schedule: ask its record in schedule/schedules.py"
