"""A model through inductor gives the loss and gradients of one fp32 process.

On one rank, for inductor takes a minute to begin on a CPU; plans are compiled with aot_eager
elsewhere, and with inductor by `python -m engine.verify parity --all` on GPUs.
"""

import pytest

from tests.parity.cases import Case, run_case
from tests.ranks import RankPool


@pytest.mark.slow
def test_inductor_gives_the_same_gradients(ranks: RankPool) -> None:
    case = Case(backend="inductor", checkpointing="op")
    (result,) = ranks(1, run_case, case, timeout_seconds=280)
    result.check()
