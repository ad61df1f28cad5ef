"""Keeping or dropping rows so that an energy over pairs of them is smallest."""

from __future__ import annotations

import numpy as np

# Capacities are integers below 2 ** 31, and the flow back through an edge adds up.
LARGEST = 2**29


def keep_or_drop(
    costs: np.ndarray, edges: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    r"""The labelling that minimises `Σ_i s_i c_i + Σ_ij w_ij |s_i − s_j|`.

    It is a minimum cut, found by maximum flow (Greig, Porteous, Seheult 1989): exact up
    to the rounding of the costs to 1 / 2^29 of the largest.

    Args:
        costs: `c`, float `(N,)`: what it costs to keep row i; below 0 it pays.
        edges: Pairs `(i, j)` of different rows, integers `(M, 2)`.
        weights: `w`, float `(M,)`, at least 0.

    Returns:
        `s`, bool `(N,)`. Where keeping and dropping cost the same, rows are dropped.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    rows = len(costs)
    costs = np.asarray(costs, "float64")
    weights = np.asarray(weights, "float64")
    first, second = np.asarray(edges, "int64").reshape(-1, 2).T
    # Beyond what its edges weigh together, a row is decided whatever its neighbours do.
    around = np.bincount(first, weights, rows) + np.bincount(second, weights, rows)
    costs = np.clip(costs, -1 - around, 1 + around)
    largest = max(np.abs(costs).max(), weights.max(initial=0.0))
    scale = LARGEST / largest if largest else 0.0
    source, sink = rows, rows + 1
    pays, charges = np.flatnonzero(costs < 0), np.flatnonzero(costs > 0)
    start = np.concatenate([np.full(len(pays), source), charges, first, second])
    end = np.concatenate([pays, np.full(len(charges), sink), second, first])
    capacity = np.concatenate([-costs[pays], costs[charges], weights, weights])
    graph = coo_array(
        (np.rint(capacity * scale).astype("int64"), (start, end)),
        shape=(rows + 2, rows + 2),
    ).tocsr()  # adds up what edges that are there twice weigh
    graph.data = np.minimum(graph.data, 2 * LARGEST).astype("int32")
    graph.eliminate_zeros()
    flow = maximum_flow(graph, source, sink).flow
    residual = graph - flow
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    keep = np.zeros(rows + 2, bool)
    keep[reached] = True
    return keep[:rows]
