"""The balanced linear assignment of BASE layers, exactly. Shapes: T tokens, E experts.

Maximise the sum of score[t, a(t)] over all assignments a that give no expert more than ceil(T / E) tokens.

Successive shortest paths: every token starts at its best expert; then, as long as an expert has too many, one token
moves along each edge of the cheapest chain of experts from a full one to one with room. The edge from e to f costs
what the cheapest token of e loses at f. The graph has E nodes, so a chain is found fast, and the result is the optimum,
where an auction stops within a tolerance of it. A token that must move costs about 0.3 ms on a CPU.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def balanced_assignment(score_TE: Tensor) -> Tensor:
    """The expert of each token, int64 (T,), on the device of the scores.

    Runs on the host, so it waits for the scores: which chain comes next depends on the one before.

    Raises:
        ValueError: a score is not finite.
    """
    score = score_TE.detach().double().cpu()
    if not bool(score.isfinite().all()):
        raise ValueError("balanced assignment: some scores are not finite; the training has diverged")
    num_tokens, num_experts = score.shape
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=score_TE.device)
    limit = -(-num_tokens // num_experts)
    assigned = score.argmax(dim=1)
    load = torch.bincount(assigned, minlength=num_experts)
    cost = torch.full((num_experts, num_experts), torch.inf, dtype=torch.float64)
    mover = torch.zeros(num_experts, num_experts, dtype=torch.int64)
    for expert in range(num_experts):
        _edges_from(expert, score, assigned, cost, mover)
    # Rounding must not make a cycle of edges look profitable.
    tolerance = 1e-12 * float(score.abs().max())
    while bool((load > limit).any()):
        chain = _cheapest_chain(cost, load, limit, tolerance)
        moves = [(int(mover[e, f]), f) for e, f in itertools.pairwise(chain)]
        for token, expert in moves:
            assigned[token] = expert
        load[chain[0]] -= 1
        load[chain[-1]] += 1
        for expert in chain:
            _edges_from(expert, score, assigned, cost, mover)
    return assigned.to(score_TE.device)


def _edges_from(expert: int, score: Tensor, assigned: Tensor, cost: Tensor, mover: Tensor) -> None:
    """Fills in what moving the cheapest token of this expert to each other one costs, and which token that is."""
    tokens = (assigned == expert).nonzero().squeeze(1)
    if tokens.numel() == 0:
        cost[expert] = torch.inf
        return
    own = score[tokens]
    loss, which = (own[:, expert : expert + 1] - own).min(dim=0)
    cost[expert], mover[expert] = loss, tokens[which]


def _cheapest_chain(cost: Tensor, load: Tensor, limit: int, tolerance: float) -> list[int]:
    """Experts from one with too many tokens to one with room, by Bellman-Ford from all full ones at once."""
    num_experts = cost.shape[0]
    distance = torch.where(load > limit, 0.0, torch.inf).double()
    before = torch.full((num_experts,), -1)
    for _ in range(num_experts - 1):
        shortest, via = (distance.unsqueeze(1) + cost).min(dim=0)
        better = shortest < distance - tolerance
        if not bool(better.any()):
            break
        distance = torch.where(better, shortest, distance)
        before = torch.where(better, via, before)
    expert = int(torch.where(load < limit, distance, torch.inf).argmin())
    chain = [expert]
    while int(before[expert]) >= 0:
        expert = int(before[expert])
        chain.append(expert)
    return chain[::-1]
