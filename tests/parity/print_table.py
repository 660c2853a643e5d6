"""`python -m tests.parity.print_table` prints each eager plan and its worst gradient error."""

import tests.conftest  # noqa: F401  one thread per process, before torch loads
from tests.parity.cases import LAYOUTS, Case, Comparison, pairwise, run_case, table
from tests.ranks import RankPool


def measure(pool: RankPool, cases: list[Case]) -> list[tuple[Case, Comparison]]:
    """Run each case on its ranks; return it with the comparison of rank 0."""
    return [(case, pool(case.world_size, run_case, case)[0]) for case in cases]


if __name__ == "__main__":
    ranks = RankPool()
    print(table(measure(ranks, [*LAYOUTS, *pairwise()])))
    ranks.close()
