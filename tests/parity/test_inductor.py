"""Plans through inductor give the loss and gradients of one fp32 process.

They are in one file because the tests of a file share a pool of ranks: what the first case makes,
headers compiled beforehand above all, spares the others most of their time. The other ways of
activation checkpointing, and `allgather`, are compiled with aot_eager elsewhere; with inductor by
`python -m engine.verify parity --all` on GPUs.
"""

import pytest

from tests.parity.cases import Case, run_case
from tests.ranks import RankPool

CASES = [
    Case(tp=2, backend="inductor", checkpointing="op"),
    Case(cp=2, context="ring", backend="inductor", checkpointing="full"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inductor_gives_the_same_gradients(ranks: RankPool, case: Case) -> None:
    for result in ranks(case.world_size, run_case, case, timeout_seconds=280):
        result.check()
