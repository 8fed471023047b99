"""The loss of few targets is mixed with that of the pool, as far as chance alone may tell them apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.estimators.interactions import Interactions
from lightning_influence.estimators.whitened import BLOCK


def pool_share(features: Tensor, targets: Tensor, shares: Tensor | None = None, unseen: Tensor | None = None) -> float:
    """How much the pool shall count in the target loss, a in [0, 1): James and Stein's shrinkage to the pool's mean.

    The mean whitened gradient b̄ of m targets is off that of all examples like them, b, by V = E‖b̄ − b‖², and the
    pool's mean φ̄ by its own V_p and by what pool and targets really differ in, δ². The expected squared error of
    (1 − a) b̄ + a φ̄, (1 − a)² V + a² (V_p + δ²), is least at

        a = V / (V + V_p + δ²),   E‖b̄ − φ̄‖² = V + V_p + δ²,

    so a = V / max(‖b̄ − φ̄‖², V + V_p), with V and V_p from the scatter of targets and pool. For targets drawn like the
    pool that is about n / (n + m), one for one; for many targets, or of another kind, it goes to 0. (James and Stein
    1961, the part that cannot be negative.)

    Args:
        features: Φ of the pool [n, r], any float dtype.
        targets: Φ_t [m, r] in the same basis.
        shares: Factor of each target, [m]; None for the mean. Where one is negative, the pool does not count: there is
            something to be avoided.
        unseen: Squared length [n] of what the features leave out of each pool gradient; None for nothing.

    Returns:
        a; 0 for a single target, whose scatter is not known, and for targets that are all alike.
    """
    goals = targets.double()
    counts = goals.new_ones(len(goals)) if shares is None else shares.to(goals)
    if bool((counts < 0).any()) or int((counts > 0).sum()) < 2:
        return 0.0
    counts = counts / counts.sum()
    mean, repeats = counts @ goals, float(counts.square().sum())
    noise = float(counts @ (goals - mean).square().sum(1)) * repeats / (1 - repeats)
    pool, squares = torch.zeros_like(mean), 0.0
    for block in torch.split(features, BLOCK):  # in float64 a block at a time: features may be a memory map
        rows = block.to(mean)
        pool += rows.sum(0) / len(features)
        squares += float(rows.square().sum()) / len(features)
    missing = 0.0 if unseen is None else float(unseen.double().mean())
    pool_noise = (squares + missing - float(pool.square().sum())) / len(features)
    apart = float((mean - pool).square().sum()) + missing / len(features)
    return noise / max(apart, noise + pool_noise) if noise > 0 else 0.0


def with_pool(interactions: Interactions, share: float) -> Interactions:
    """The same rows for the target loss (1 − a) f + a · (mean loss of the pool), with the pool's empirical Fisher.

    Args:
        interactions: Of whitened gradients, from `Interactions.from_features`.
        share: a, in [0, 1].
    """
    if share == 0:
        return interactions
    features, metric = interactions.features, interactions.metric
    n, r = features.shape
    pool, fisher = torch.zeros(r).to(interactions.values), torch.zeros(r, r).to(interactions.values)
    for block in torch.split(features, BLOCK):
        rows = block.to(fisher)
        pool += rows.sum(0) / n
        fisher.addmm_(rows.T, rows, alpha=share / n)
    values = torch.cat([block.to(pool) @ pool for block in torch.split(features, BLOCK)])
    own = torch.eye(r).to(fisher) if metric is None else metric
    values = (1 - share) * interactions.values + share * values
    return replace(interactions, values=values, metric=fisher.add_(own, alpha=1 - share))
