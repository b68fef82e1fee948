"""The multiple-choice knapsack: one option of each row, within a budget, so that the sum of their costs is the least.

Where options may mix, the optimum takes the steepest steps first, along the convex hull of each row's (size, cost); the
slope at which the budget ends is a price for size. That gives a choice, a bound, and the options that the price rules
out. What is left, a few rows, is solved by dynamic programming over sums that no other beats in size and cost.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Row", "Solution", "least"]

# Sums that are kept over all rows, 16 bytes each; beyond it they are thinned out.
MOST_SUMS = 2**21

Row = Sequence[tuple[int, float]]


class Solution(NamedTuple):
    """The number of the option taken of each row, and what no choice within the budget costs less than."""

    options: tuple[int, ...]
    bound: float


class _Steps(NamedTuple):
    """From the smallest option of each row along its convex hull, the steepest first: what each adds, [steps]."""

    row: Tensor
    option: Tensor
    size: Tensor
    cost: Tensor

    @property
    def slope(self) -> Tensor:
        return self.cost / self.size


def least(rows: Sequence[Row], budget: int, *, most: int = MOST_SUMS) -> Solution:
    """One option, (size, cost), of each row: the least sum of costs whose sum of sizes is at most the budget.

    Of equal costs the smaller, then the earlier option. Exact while at most `most` sums are open, and `bound` is then
    the cost. Else the cost exceeds `bound` by less than one step of one row.

    Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, 1979, for the relaxation and the price; Kellerer,
    Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.

    Example:
        >>> least([[(1, 9.0), (2, 5.0)], [(1, 6.0), (2, 1.0), (3, 0.0)]], budget=4)
        Solution(options=(1, 1), bound=6.0)
    """
    tables = [_undominated(row) for row in rows]
    left = budget - sum(row[table[0]][0] for row, table in zip(rows, tables, strict=True))
    assert left >= 0
    taken, price = _steepest(_steps(rows, tables), tables, left)
    best = sum(row[option][1] for row, option in zip(rows, taken, strict=True))
    slack = 1e-12 * sum(abs(row[i][1]) for row, table in zip(rows, tables, strict=True) for i in table)  # of float sums
    priced = [[row[i][1] + price * row[i][0] for i in table] for row, table in zip(rows, tables, strict=True)]
    bound = sum(map(min, priced)) - price * budget
    tables = [
        [i for i, cost in zip(table, costs, strict=True) if bound + cost - min(costs) <= best + slack]
        for table, costs in zip(tables, priced, strict=True)
    ]
    core = [number for number, table in enumerate(tables) if len(table) > 1]
    fixed = {number: table[0] for number, table in enumerate(tables) if len(table) == 1}
    found, is_exact = _best_sums(
        [rows[number] for number in core],
        [tables[number] for number in core],
        budget - sum(rows[number][option][0] for number, option in fixed.items()),
        best - sum(rows[number][option][1] for number, option in fixed.items()) + slack,
        most,
    )
    if found is not None:
        option_of = fixed | dict(zip(core, found, strict=True))
        chosen = [option_of[number] for number in range(len(rows))]
        if is_exact or sum(row[option][1] for row, option in zip(rows, chosen, strict=True)) <= best:
            taken = chosen
    cost = sum(row[option][1] for row, option in zip(rows, taken, strict=True))
    return Solution(tuple(taken), cost if is_exact else min(bound, cost))


def _undominated(row: Row) -> list[int]:
    """Numbers of the options that cost less than all smaller ones, by size; of equals the first."""
    found: list[int] = []
    for i in sorted(range(len(row)), key=lambda i: row[i]):
        if not found or row[i][1] < row[found[-1]][1]:
            found.append(i)
    return found


def _steps(rows: Sequence[Row], tables: Sequence[list[int]]) -> _Steps:
    found: list[tuple[float, int, int, int, float]] = []
    for number, (row, table) in enumerate(zip(rows, tables, strict=True)):
        hull: list[int] = []
        for option in table:
            while len(hull) > 1 and _slope(row[hull[-1]], row[option]) <= _slope(row[hull[-2]], row[hull[-1]]):
                hull.pop()
            hull.append(option)
        for one, other in pairwise(hull):
            size, cost = row[other][0] - row[one][0], row[other][1] - row[one][1]
            found.append((cost / size, number, other, size, cost))
    found.sort()  # slopes rise within a row, so its steps stay in their order
    number, option, size = (torch.tensor([step[i] for step in found], dtype=torch.int64) for i in (1, 2, 3))
    return _Steps(number, option, size, torch.tensor([step[4] for step in found], dtype=torch.float64))


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _steepest(steps: _Steps, tables: Sequence[list[int]], left: int) -> tuple[list[int], float]:
    """The option of each row after all steps that fit, the steepest first; and the price of size, 0 if all fit."""
    taken, closed, price = [table[0] for table in tables], set[int](), 0.0
    for row, option, size, slope in zip(*(column.tolist() for column in (*steps[:3], steps.slope)), strict=True):
        if size > left and not closed:
            price = -slope
        if size > left:
            closed.add(row)
        elif row not in closed:
            taken[row], left = option, left - size
    return taken, price


def _best_sums(
    rows: Sequence[Row], tables: Sequence[list[int]], budget: int, best: float, most: int
) -> tuple[list[int] | None, bool]:
    """The options of the least sum, None if there is none up to `best`; and whether no sum was left out of account."""
    steps = _steps(rows, tables)
    sizes = [torch.tensor([row[i][0] for i in table]) for row, table in zip(rows, tables, strict=True)]
    costs = [
        torch.tensor([row[i][1] for i in table], dtype=torch.float64) for row, table in zip(rows, tables, strict=True)
    ]
    size, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    kept: list[tuple[Tensor, Tensor]] = []
    is_exact, limit = True, max(most // max(len(rows), 1), 2)
    for number, (of_size, of_cost) in enumerate(zip(sizes, costs, strict=True)):
        left = budget - sum(int(later[0]) for later in sizes[number + 1 :])
        size, cost = (size[:, None] + of_size).flatten(), (cost[:, None] + of_cost).flatten()
        base = sum(float(later[0]) for later in costs[number + 1 :])
        is_open = (size <= left) & (cost + base + _relaxed(steps, number + 1, left - size) <= best)
        order = is_open.nonzero().flatten()
        order = order[cost[order].argsort(stable=True)]
        order = order[size[order].argsort(stable=True)]
        least_before = torch.cat([torch.tensor([torch.inf], dtype=torch.float64), cost[order].cummin(0).values])[:-1]
        order = order[cost[order] < least_before]
        if len(order) > limit:  # of sums of about one size the least is kept
            is_exact = False
            place = (size[order] - size[order[0]]) * limit // (size[order[-1]] - size[order[0]] + 1)
            order = order[torch.cat([place[1:] != place[:-1], torch.ones(1, dtype=torch.bool)])]
        size, cost = size[order], cost[order]
        kept.append((order // len(of_size), order % len(of_size)))
    if not len(cost):
        return None, is_exact
    found, at = list[int](), len(cost) - 1
    for table, (parent, option) in zip(reversed(tables), reversed(kept), strict=True):
        found.append(table[int(option[at])])
        at = int(parent[at])
    return found[::-1], is_exact


def _relaxed(steps: _Steps, first: int, left: Tensor) -> Tensor:
    """What rows from `first` on can cost less than their smallest options, where options mix, with sizes left over."""
    is_later = steps.row >= first
    size, cost, slope = (column[is_later] for column in (steps.size, steps.cost, steps.slope))
    ends, zero = size.cumsum(0), torch.zeros(1, dtype=torch.float64)
    whole = torch.searchsorted(ends, left, right=True)
    begun = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[whole]
    return torch.cat([zero, cost.cumsum(0)])[whole] + torch.cat([slope, zero])[whole] * (left - begun)
