"""The most that a rank holds of activations and of what it sends, in the order in which it acts.

    actions (schedule/) + costs of stages (rank_cost.py) --peak_activations--> predict.py

Where sequences are not cut over tensor ranks, these hold the same payloads: each sends a part of them
(parallel/pipeline/parts.py).
"""

from __future__ import annotations

from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.plan.passes import Message
from roots_dist.runs.plan.rank_cost import RankCost, StageCost
from roots_dist.schedule.actions import Action, Kind
from roots_dist.schedule.communication import COMPUTE


def parts_of_payloads(config: Config, layout: Layout) -> int:
    """Parts in which tensor ranks send a payload to the next stage."""
    return 1 if config.parallel.sequence_parallel else layout.tp


def gathers(config: Config, layout: Layout, cost: StageCost, kind: Kind, stage: int) -> tuple[Message, ...]:
    """Messages by which tensor ranks gather what a pass of a stage has received."""
    if parts_of_payloads(config, layout) == 1 or layout.pp == 1:
        return ()
    if kind is Kind.FORWARD:
        received = cost.input_bytes if stage > 0 else 0
    else:
        received = cost.output_grad_bytes if kind is not Kind.WEIGHT and stage < config.num_stages() - 1 else 0
    return (Message("all_gather", received),) if received else ()


def peak_activations(actions: list[Action], found: RankCost, gradients: int, kept: int, parts: int) -> int:
    """Peak bytes in the order in which the rank acts: activations, messages, gradients of weights.

    gradients: bytes of whole ones; kept: what the rank has of them after a pass. If that is less, each pass makes whole
    ones anew and hands them on piece by piece. parts: of a payload that is sent, of which a rank sends and receives one
    and gathers the others when it computes.
    """
    held = most = leaving = made = 0
    arrived: set[tuple[int, int]] = set()
    handed_on: set[tuple[int, int]] = set()
    stages_with_gradients: set[int] = set()
    for kind, stage, i in actions:
        cost = found.stages[stage]
        if kind is Kind.RECV_FORWARD:
            held += cost.input_bytes // parts
            arrived.add((stage, i))
        elif kind is Kind.RECV_BACKWARD:
            held += cost.output_grad_bytes // parts
            arrived.add((stage, ~i))
        elif kind is Kind.SEND_FORWARD:  # without a reply gloo holds it until the end of the step
            handed_on.add((stage, i))
            held += cost.output_bytes // parts - (cost.output_bytes if stage >= found.first_trainable else 0)
        elif kind is Kind.SEND_BACKWARD:  # held until the next one is sent
            part = cost.input_grad_bytes // parts
            held, leaving = held - leaving - cost.input_grad_bytes + part, part
        elif kind is Kind.FORWARD:
            held -= cost.input_bytes // parts if (stage, i) in arrived else 0  # the pass saves it
            most = max(most, held + made + cost.passes[kind].peak_rise)
            held += cost.saved_bytes
        elif kind in COMPUTE:
            first, one = stage not in stages_with_gradients, cost.passes[kind]
            if (stage, ~i) in arrived:  # the other parts are gathered
                held += cost.output_grad_bytes - cost.output_grad_bytes // parts
                arrived.remove((stage, ~i))
            rise = one.first_peak_rise if first else one.peak_rise
            if kept < gradients:
                rise = max(more + (summed * kept // gradients if first else 0) for more, summed in one.handed_on)
            most = max(most, held + made + rise)
            if kind is Kind.WEIGHT:
                held -= cost.deferred_bytes
            else:
                held += (
                    cost.deferred_bytes
                    - cost.saved_bytes
                    - cost.output_grad_bytes
                    + (cost.input_grad_bytes if stage > 0 else 0)
                )
                if (stage, i) in handed_on:  # of the output, which counts as saved, its part alone was left
                    held += cost.output_bytes - cost.output_bytes // parts
                    handed_on.remove((stage, i))
            if kind is not Kind.INPUT and first:
                stages_with_gradients.add(stage)
                made = min(kept, made + cost.gradients * kept // max(1, gradients))
    return max(most, kept)
