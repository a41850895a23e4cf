"""Losses of distributional and actor-critic algorithms: pure functions of tensors."""

import math
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


# ---------------------------------------------------------------------- Gaussian policies
# `scale` is either the standard deviations of independent actions, (batch_size, action_dim), or the lower Cholesky factor
# of a full covariance, (batch_size, action_dim, action_dim)


def is_full(mean: th.Tensor, scale: th.Tensor) -> bool:
    """
    Whether ``scale`` is the Cholesky factor of a full covariance.

    :param mean: means, ``(batch_size, action_dim)``
    :param scale: standard deviations, or Cholesky factors
    """
    action_dim = mean.shape[-1]
    assert scale.shape in (mean.shape, (*mean.shape, action_dim)), f"scale {tuple(scale.shape)}, mean {tuple(mean.shape)}"
    return scale.ndim > mean.ndim


def gaussian_sample(mean: th.Tensor, scale: th.Tensor, n_samples: int) -> th.Tensor:
    """
    Draw from Gaussians.

    :param mean: ``(batch_size, action_dim)``
    :param scale: standard deviations, or Cholesky factors
    :param n_samples: number of draws from each
    :return: ``(batch_size, n_samples, action_dim)``
    """
    noise = th.randn(mean.shape[0], n_samples, mean.shape[1], device=mean.device, dtype=mean.dtype)
    spread = noise @ scale.transpose(1, 2) if is_full(mean, scale) else noise * scale.unsqueeze(1)
    return mean.unsqueeze(1) + spread


def gaussian_log_prob(actions: th.Tensor, mean: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """
    Log-densities of several actions in each state.

    :param actions: ``(batch_size, n_samples, action_dim)``
    :param mean: ``(batch_size, action_dim)``
    :param scale: standard deviations, or Cholesky factors
    :return: ``(batch_size, n_samples)``
    """
    errors = actions - mean.unsqueeze(1)
    if is_full(mean, scale):
        standard = th.linalg.solve_triangular(scale, errors.transpose(1, 2), upper=False).transpose(1, 2)
        log_det = scale.diagonal(dim1=1, dim2=2).log().sum(dim=1, keepdim=True)
    else:
        standard = errors / scale.unsqueeze(1)
        log_det = scale.log().sum(dim=1, keepdim=True)
    return -0.5 * standard.square().sum(dim=2) - log_det - 0.5 * mean.shape[1] * math.log(2 * math.pi)


def gaussian_mean_kl(old_mean: th.Tensor, old_scale: th.Tensor, mean: th.Tensor) -> th.Tensor:
    """
    ``KL(N(old_mean, old) || N(mean, old))``: what a change of the mean alone costs.

    Abdolmaleki et al. 2018 (arXiv:1812.02256), the decoupled M-step.

    :param old_mean: means of the old policy, ``(batch_size, action_dim)``
    :param old_scale: its standard deviations, or Cholesky factors
    :param mean: means of the new policy
    :return: of each dimension, ``(batch_size, action_dim)``; ``(batch_size, 1)`` for a full covariance
    """
    if is_full(old_mean, old_scale):
        standard = th.linalg.solve_triangular(old_scale, (mean - old_mean).unsqueeze(2), upper=False)
        return 0.5 * standard.square().sum(dim=1)
    return 0.5 * ((mean - old_mean) / old_scale).square()


def gaussian_covariance_kl(old_scale: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """
    ``KL(N(mean, old) || N(mean, new))``: what a change of the covariance alone costs.

    Abdolmaleki et al. 2018 (arXiv:1812.02256), the decoupled M-step.

    :param old_scale: standard deviations of the old policy ``(batch_size, action_dim)``, or its Cholesky factors
    :param scale: those of the new one
    :return: of each dimension, ``(batch_size, action_dim)``; ``(batch_size, 1)`` for a full covariance
    """
    if scale.ndim == 3:
        # trace(new^-1 old) is the squared norm of L^-1 L_old
        ratio = th.linalg.solve_triangular(scale, old_scale, upper=False)
        diagonals = [one.diagonal(dim1=1, dim2=2).log() for one in (scale, old_scale)]
        log_det = (diagonals[0] - diagonals[1]).sum(dim=1, keepdim=True)
        return 0.5 * (ratio.square().sum(dim=(1, 2)).unsqueeze(1) - scale.shape[1]) + log_det
    ratio = old_scale / scale
    return 0.5 * (ratio.square() - 1) - ratio.log()


# ---------------------------------------------------------------------- MPO: the E-step


def exponential_weights(q_values: th.Tensor, temperature: th.Tensor | float) -> th.Tensor:
    """
    Weights proportional to ``exp(q / temperature)``: of all weights whose KL from the uniform ones is as theirs, those of
    the highest mean value.

    Abdolmaleki et al. 2018 (arXiv:1806.06920), equation 7, on sampled actions.

    :param q_values: values of actions drawn from the old policy, ``(batch_size, n_samples)``
    :param temperature: the dual variable of the constraint on that KL, positive
    :return: weights ``(batch_size, n_samples)`` that sum to 1 in each state
    """
    return th.softmax(q_values / temperature, dim=1)


def temperature_dual(
    q_values: th.Tensor, temperature: th.Tensor, epsilon: float, log_policy: th.Tensor | None = None
) -> th.Tensor:
    """
    Dual function of the E-step, whose derivative is ``epsilon`` less the mean KL of the weights from the old policy.

    Abdolmaleki et al. 2018 (arXiv:1806.06920), equation 8.

    :param q_values: values of sampled actions ``(batch_size, n_samples)``, or of all actions ``(batch_size, n_actions)``
    :param temperature: the dual variable, positive; one number
    :param epsilon: bound on the KL
    :param log_policy: log-probabilities of all actions under the old policy, where these are enumerated
    :return: a tensor without dimensions, to be minimised
    """
    if log_policy is None:
        log_means = th.logsumexp(q_values / temperature, dim=1) - math.log(q_values.shape[1])
    else:
        log_means = th.logsumexp(log_policy + q_values / temperature, dim=1)
    return (temperature * (epsilon + log_means.mean())).sum()


def rank_weights(q_values: th.Tensor, offset: float = 0.5) -> th.Tensor:
    """
    Weights by rank, ``log((n_samples + offset) / rank)`` and normalised, as in CMA-ES: the same for any increasing
    transform of the values.

    Abdolmaleki et al. 2018 (arXiv:1812.02256), section 4.

    :param q_values: values of actions drawn from the old policy, ``(batch_size, n_samples)``
    :param offset: above 0, so that the weight of the last rank is positive
    :return: weights ``(batch_size, n_samples)`` that sum to 1 in each state
    """
    n_samples = q_values.shape[1]
    # The inverse of the sorting permutation: 0 for the best action
    ranks = q_values.argsort(dim=1, descending=True).argsort(dim=1)
    weights = math.log(n_samples + offset) - th.arange(1, n_samples + 1, device=q_values.device, dtype=q_values.dtype).log()
    return (weights / weights.sum())[ranks]


def identity_weights(q_values: th.Tensor) -> th.Tensor:
    """
    The values themselves, less their mean in each state, which changes nothing in expectation: a policy gradient.

    Abdolmaleki et al. 2018 (arXiv:1812.02256), section 4.

    :param q_values: values of actions drawn from the old policy, ``(batch_size, n_samples)``
    :return: weights ``(batch_size, n_samples)`` that sum to 0 in each state
    """
    return (q_values - q_values.mean(dim=1, keepdim=True)) / q_values.shape[1]


def categorical_weights(q_values: th.Tensor, log_policy: th.Tensor, temperature: th.Tensor | float) -> th.Tensor:
    """
    The improved policy over enumerated actions, proportional to ``old policy * exp(q / temperature)``.

    Abdolmaleki et al. 2018 (arXiv:1806.06920), equation 7.

    :param q_values: values of all actions, ``(batch_size, n_actions)``
    :param log_policy: log-probabilities of the old policy
    :param temperature: the dual variable, positive
    :return: probabilities ``(batch_size, n_actions)``
    """
    return th.softmax(log_policy + q_values / temperature, dim=1)


# ---------------------------------------------------------------------- MPO: the M-step


def decoupled_cross_entropy(
    weights: th.Tensor, actions: th.Tensor, old: tuple[th.Tensor, th.Tensor], new: tuple[th.Tensor, th.Tensor]
) -> th.Tensor:
    """
    Weighted log-likelihood of a Gaussian policy, once with the old covariance and once with the old mean.

    Abdolmaleki et al. 2018 (arXiv:1812.02256), the decoupled M-step: mean and covariance get each a gradient of its own.

    :param weights: ``(batch_size, n_samples)``
    :param actions: actions drawn from the old policy, ``(batch_size, n_samples, action_dim)``
    :param old: mean and scale of the old policy
    :param new: mean and scale of the new one
    :return: negative, averaged over the states; a tensor without dimensions, to be minimised
    """
    log_probs = gaussian_log_prob(actions, new[0], old[1]) + gaussian_log_prob(actions, old[0], new[1])
    return -(weights * log_probs).sum(dim=1).mean()


def kl_penalty(kl: th.Tensor, alpha: th.Tensor, epsilon: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Lagrangian of the constraint ``kl <= epsilon``, in its two halves.

    :param kl: mean KL over the states, ``()``, or that of each dimension, ``(action_dim,)``
    :param alpha: the multipliers, of the same shape
    :param epsilon: bound on each
    :return: the term of the policy's loss, ``alpha * kl`` with the multiplier fixed; and that of the multiplier,
        ``alpha * (epsilon - kl)`` with the KL fixed, to be minimised too. Tensors without dimensions
    """
    assert kl.shape == alpha.shape, f"kl {tuple(kl.shape)} and alpha {tuple(alpha.shape)} must have one shape"
    return (alpha.detach() * kl).sum(), (alpha * (epsilon - kl.detach())).sum()


def out_of_range_cost(actions: th.Tensor) -> th.Tensor:
    """
    Distance of actions from the range [-1, 1], negative: the value that the action penalty of MO-MPO improves.

    Abdolmaleki et al. 2020 (arXiv:2005.07513), as in Acme's MPO.

    :param actions: ``(batch_size, n_samples, action_dim)``
    :return: ``(batch_size, n_samples)``
    """
    return -(actions - actions.clamp(-1, 1)).norm(dim=2)


def retrace(
    rewards: th.Tensor,
    discounts: th.Tensor,
    q_values: th.Tensor,
    next_values: th.Tensor,
    log_ratios: th.Tensor,
    valid: th.Tensor,
) -> th.Tensor:
    """
    Off-policy corrected returns of sequences.

    Munos et al. 2016 (arXiv:1606.02647), equation 3 with ``lambda = 1``: the temporal differences of later steps count as
    far as the policy would have taken the actions before them.

    :param rewards: ``(batch_size, n_steps)``
    :param discounts: gamma, or 0 after a terminal state, ``(batch_size, n_steps)``
    :param q_values: values of the actions that were taken
    :param next_values: values of the next states
    :param log_ratios: log-probability of the actions under the policy, less that under the behaviour; of all but the
        first, which is given: ``(batch_size, n_steps - 1)``
    :param valid: whether a step belongs to the episode of the first
    :return: ``(batch_size, 1)``
    """
    differences = (rewards + discounts * next_values - q_values) * valid
    # min(1, pi / mu) of an action weighs its difference and all later ones
    traces = log_ratios.clamp(max=0).exp() * valid[:, 1:]
    factors = th.cat([th.ones_like(rewards[:, :1]), discounts[:, :-1] * traces], dim=1).cumprod(dim=1)
    return q_values[:, :1] + (factors * differences).sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------- soft Q-learning with continuous actions


def squash_log_det(gaussian_actions: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the derivative of tanh: what its density gains where actions are squashed.

    In a form that stays finite where tanh is 1 to the last bit.

    :param gaussian_actions: actions before they are squashed, ``(..., action_dim)``
    :return: ``sum(log(1 - tanh(u)^2))``, ``(...)``
    """
    u = gaussian_actions
    return (2 * (math.log(2) - u - th.nn.functional.softplus(-2 * u))).sum(dim=-1)


def sampled_soft_value(q_values: th.Tensor, log_densities: th.Tensor, temperature: float) -> th.Tensor:
    """
    ``temperature * log integral exp(q / temperature)`` over the actions, by importance sampling.

    Haarnoja et al. 2017 (arXiv:1702.08165), equation 10.

    :param q_values: values of sampled actions, ``(batch_size, n_samples)``
    :param log_densities: of the distribution that these were drawn from
    :param temperature: positive
    :return: ``(batch_size, 1)``
    """
    log_weights = q_values / temperature - log_densities
    return temperature * (th.logsumexp(log_weights, dim=1, keepdim=True) - math.log(q_values.shape[1]))


def stein_direction(particles: th.Tensor, scores: th.Tensor, updated: th.Tensor) -> th.Tensor:
    """
    Where points have to move so that their distribution comes closest to a density, in a Gaussian kernel's function space.

    ``mean_j [k(x_j, y) * score(x_j) + d k(x_j, y) / d x_j]``: towards the density, and away from the particles. The kernel
    is ``exp(-|x - y|^2 / h)``, with ``h`` in each state the median of the squared distances over ``log(n_particles)``.
    Liu and Wang 2016 (arXiv:1608.04471), equation 8, as in Haarnoja et al. 2017 (arXiv:1702.08165), equation 13.

    :param particles: samples of the distribution, ``x``: ``(batch_size, n_particles, action_dim)``, at least 2 in a state
    :param scores: derivatives of the density's log at these
    :param updated: the points ``y``, ``(batch_size, n_updated, action_dim)``
    :return: directions of the points, ``(batch_size, n_updated, action_dim)``
    """
    assert particles.shape == scores.shape and particles.shape[1] >= 2, f"{tuple(particles.shape)} {tuple(scores.shape)}"
    differences = particles.unsqueeze(2) - updated.unsqueeze(1)  # (batch_size, n_particles, n_updated, action_dim)
    distances = differences.square().sum(dim=3)
    bandwidth = distances.flatten(1).median(dim=1).values / math.log(particles.shape[1])
    bandwidth = bandwidth.clamp(min=1e-3).view(-1, 1, 1)
    kernel = (-distances / bandwidth).exp()
    attraction = kernel.transpose(1, 2) @ scores
    repulsion = (-2 * differences * (kernel / bandwidth).unsqueeze(3)).sum(dim=1)
    return (attraction + repulsion) / particles.shape[1]
