"""Every encoder and its tasks compute in every layout what they compute in one process: float64, below 1e-10.

T5 has test_t5_layouts.py; tasks of decoders are with the decoders, in test_layouts.py.
"""

import pytest
from cases import case, compare, covered

STEPS = 2
CASES = [
    *covered("bert", "electra"),
    *(case(family, train__micro_batch=4) for family in ("bert", "roberta", "electra")),
    *(case(family, dp=2, tp=2, pp=2, sequence_parallel=True, zero_stage=1) for family in ("bert", "electra")),
    case("electra", pp=3, train__global_batch=6),
    case("electra", tp=2, pp=2, sequence_parallel=True, advanced__sinusoidal_init=True),  # the table is on two stages
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_depends_on_the_layout(case):
    compare(case, steps=STEPS)
