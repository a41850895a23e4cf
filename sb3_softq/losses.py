"""Losses of distributional and actor-critic algorithms: pure functions of tensors."""

from typing import Any

import torch as th

# From this many pairs of quantiles on, sorting is faster than looking at each pair (benchmarks/speed.py)
SORTED_FORM_MIN_PAIRS = 1000


def quantile_huber_loss(
    quantiles: th.Tensor,
    target_quantiles: th.Tensor,
    fractions: th.Tensor | None = None,
) -> th.Tensor:
    """
    Quantile regression loss with a Huber error (threshold 1), of every quantile against every target quantile.

    Summed over the quantiles, averaged over the target quantiles. Dabney et al. 2018 (arXiv:1710.10044), equation 10.
    Exact in both of its forms: small problems look at each of the ``n_quantiles * n_target_quantiles`` pairs; large ones
    sort the targets, after which prefix sums give the loss and its gradient in ``O(n log n)``, with sums in float64.

    :param quantiles: ``(batch_size, n_quantiles)``
    :param target_quantiles: ``(batch_size, n_target_quantiles)``
    :param fractions: the fractions that the quantiles stand for, ``(n_quantiles,)`` or ``(batch_size, n_quantiles)``;
        by default the midpoints of ``n_quantiles`` equal intervals
    :return: losses of the samples, ``(batch_size, 1)``
    """
    assert quantiles.ndim == target_quantiles.ndim == 2 and len(quantiles) == len(target_quantiles), (
        f"quantiles {tuple(quantiles.shape)} and target_quantiles {tuple(target_quantiles.shape)} must be "
        "(batch_size, n_quantiles) and (batch_size, n_target_quantiles)"
    )
    if fractions is None:
        n_quantiles = quantiles.shape[1]
        fractions = (th.arange(n_quantiles, device=quantiles.device, dtype=quantiles.dtype) + 0.5) / n_quantiles
    assert fractions.shape in (quantiles.shape, quantiles.shape[1:]), (
        f"fractions {tuple(fractions.shape)} must be {tuple(quantiles.shape)} or {tuple(quantiles.shape[1:])}"
    )
    n_pairs = quantiles.shape[1] * target_quantiles.shape[1]
    if n_pairs < SORTED_FORM_MIN_PAIRS or target_quantiles.requires_grad or fractions.requires_grad:
        losses = _loss_of_pairs(quantiles, target_quantiles, fractions)
    else:
        losses = _LossBySorting.apply(quantiles, target_quantiles, fractions)
    return losses.sum(dim=1, keepdim=True)


def _loss_of_pairs(quantiles: th.Tensor, target_quantiles: th.Tensor, fractions: th.Tensor) -> th.Tensor:
    """Loss of each quantile by all pairs, ``(batch_size, n_quantiles)``."""
    errors = target_quantiles.unsqueeze(1) - quantiles.unsqueeze(2)  # (batch_size, n_quantiles, n_target_quantiles)
    weights = (fractions.unsqueeze(-1) - (errors.detach() < 0).to(errors.dtype)).abs()
    huber = th.nn.functional.huber_loss(errors, th.zeros_like(errors), reduction="none")
    return (weights * huber).mean(dim=2)


class _LossBySorting(th.autograd.Function):
    """
    Loss of each quantile by sorted targets, ``(batch_size, n_quantiles)``.

    A quantile q meets four stretches of the sorted targets t: below q - 1 (linear), up to q (quadratic), up to q + 1
    (quadratic), and above (linear). On each the loss and its derivative need the count, the sum and the sum of squares of the
    targets only.
    """

    @staticmethod
    def forward(ctx: Any, quantiles: th.Tensor, target_quantiles: th.Tensor, fractions: th.Tensor) -> th.Tensor:
        q = quantiles.to(th.float64)
        # Around the row's mean, which keeps the squares small
        center = q.mean(dim=1, keepdim=True)
        q = q - center
        targets = target_quantiles.to(th.float64).sort(dim=1).values - center
        n_targets = targets.shape[1]
        zero = targets.new_zeros((len(targets), 1))
        sums = th.cat([zero, targets.cumsum(dim=1)], dim=1)
        squares = th.cat([zero, targets.square().cumsum(dim=1)], dim=1)
        # Where the four stretches end: counts of targets below q - 1, q and q + 1, and of all
        bounds = th.cat([q - 1, q, q + 1], dim=1)
        ends = th.searchsorted(targets, bounds).chunk(3, dim=1)
        counts = [end.to(q.dtype) for end in ends] + [th.full_like(q, n_targets)]
        sums_at = [sums.gather(1, end) for end in ends] + [sums[:, -1:].expand_as(q)]
        squares_at = [squares.gather(1, end) for end in ends[:3]]

        def stretch(i: int) -> tuple[th.Tensor, th.Tensor]:
            """Count and sum of (t - q) of stretch i."""
            if i == 0:
                return counts[0], sums_at[0] - q * counts[0]
            count = counts[i] - counts[i - 1]
            return count, sums_at[i] - sums_at[i - 1] - q * count

        def half_square(i: int) -> th.Tensor:
            """Half the sum of (t - q)^2 of stretch i."""
            count, error = stretch(i)
            # sum (t - q)^2 = sum t^2 - 2 q sum t + n q^2 = sum t^2 - 2 q sum (t - q) - n q^2
            return 0.5 * (squares_at[i] - squares_at[i - 1] - 2 * q * error - count * q.square())

        (far_below, error_far_below), (_, error_below) = stretch(0), stretch(1)
        (_, error_above), (far_above, error_far_above) = stretch(2), stretch(3)
        below = half_square(1) - error_far_below - 0.5 * far_below
        above = half_square(2) + error_far_above - 0.5 * far_above
        weights = fractions.to(q.dtype)
        # d/dq: -1 on the linear stretch above, +1 below, -(t - q) between
        gradient = (1 - weights) * (far_below - error_below) - weights * (far_above + error_above)
        ctx.save_for_backward((gradient / n_targets).to(quantiles.dtype))
        return (((1 - weights) * below + weights * above) / n_targets).to(quantiles.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative, None, None
