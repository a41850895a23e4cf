"""
Exact regularised value iteration and policy iteration on a finite Markov decision process, in float64 NumPy.

For teaching, for research on small problems, and as the oracle of this package's tests: the mathematics here is written
anew, nothing of it shared with :mod:`sb3_softq.operators`. Arrays are indexed as the textbooks write them: transitions
``P[s, a, s']``, rewards ``r[s, a]``, action values ``q[s, a]``, policies ``pi[s, a]``, values ``V[s]``.

>>> mdp = random_mdp(n_states=20, n_actions=4, seed=0)
>>> optimal = value_iteration(mdp)
>>> soft = value_iteration(mdp, temperature=0.1)
>>> munchausen = value_iteration(mdp, temperature=1.0, munchausen_alpha=0.9)
>>> bool(np.allclose(soft.policy, munchausen.policy))
True
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sb3_softq.checks import check_choice, check_integer, check_number

Array = NDArray[np.float64]
Operator = Literal["lse", "mellowmax", "boltzmann"]
State = TypeVar("State")

# How far from 1 the probabilities of a row may sum
_SUM_TOLERANCE = 1e-8


# --- checks of arguments ---------------------------------------------------------------------------------------------


def _checked_array(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> Array:
    """A read-only float64 copy of finite real numbers, of that shape."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, not of {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {array.shape}")
    array = array.astype(np.float64)
    _check_entries(name, array, ~np.isfinite(array), "finite")
    array.flags.writeable = False
    return array


def _check_entries(name: str, array: Array, wrong: NDArray[np.bool_], wanted: str) -> None:
    """Raises for the first wrong entry, with its index and value."""
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name} must be {wanted}, but {name}{list(index)} is {array[index]}")


def _check_distribution(name: str, probabilities: Array) -> None:
    """Raises unless the last axis holds probabilities that sum to 1."""
    _check_entries(name, probabilities, probabilities < 0, "probabilities of at least 0")
    sums = probabilities.sum(axis=-1)
    wrong = np.abs(sums - 1) > _SUM_TOLERANCE
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name} must sum to 1 over the last axis (to within {_SUM_TOLERANCE:g}), "
            f"but {name}{list(index)} sums to {sums[index]}: divide it by its sum, in float64"
        )


def _check_mdp(mdp: object) -> None:
    if not isinstance(mdp, TabularMDP):
        raise TypeError(f"mdp must be a TabularMDP, not a {type(mdp).__name__}")


# --- the problem -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, init=False, repr=False)
class TabularMDP:
    """
    A finite Markov decision process. Checked when it is built; its arrays are read-only float64 copies.

    An episode can end: ``terminations`` is what a replay buffer calls ``dones``, the terminations and not the time limits,
    and nothing is earned after one. The value of a state is always that of a start in it, so a state that only ends
    episodes has one too, which no other state sees.

    :param transitions: probabilities ``P(s' | s, a)``, ``(n_states, n_actions, n_states)``
    :param rewards: expected rewards ``r(s, a)``, ``(n_states, n_actions)``
    :param discount: at least 0 and below 1
    :param terminations: probabilities (or booleans) that the transition ``(s, a, s')`` ends the episode,
        ``(n_states, n_actions, n_states)``; or that entering ``s'`` does, ``(n_states,)``; None for never
    :raises TypeError: if the arrays are not of real numbers, or the discount is not a number
    :raises ValueError: if shapes disagree, numbers are not finite, probabilities are outside [0, 1] or do not sum to 1
    """

    transitions: Array
    rewards: Array
    discount: float
    #: probabilities of termination, always ``(n_states, n_actions, n_states)``
    terminations: Array
    #: ``discount * P(s' | s, a)`` of the transitions that go on, ``(n_states, n_actions, n_states)``
    kernel: Array = field(init=False)

    def __init__(
        self,
        transitions: ArrayLike,
        rewards: ArrayLike,
        discount: float,
        terminations: ArrayLike | None = None,
    ) -> None:
        transitions = _checked_array("transitions", transitions)
        shape = transitions.shape
        if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
            raise ValueError(f"transitions must have the shape (n_states, n_actions, n_states), none of them 0, not {shape}")
        _check_distribution("transitions", transitions)
        rewards = _checked_array("rewards", rewards, shape[:2])
        check_number("discount", discount, 0.0, 1.0)
        if discount == 1:
            raise ValueError(f"discount must be at least 0 and below 1, not {discount!r}")
        terminations = _checked_array("terminations", np.zeros(shape[2]) if terminations is None else terminations)
        if terminations.shape not in (shape, shape[2:]):
            raise ValueError(f"terminations must have the shape {shape} or {shape[2:]}, not {terminations.shape}")
        _check_entries("terminations", terminations, (terminations < 0) | (terminations > 1), "probabilities in [0, 1]")
        kernel = discount * transitions * (1.0 - terminations)
        kernel.flags.writeable = False

        object.__setattr__(self, "transitions", transitions)
        object.__setattr__(self, "rewards", rewards)
        object.__setattr__(self, "discount", float(discount))
        object.__setattr__(self, "terminations", np.broadcast_to(terminations, shape))
        object.__setattr__(self, "kernel", kernel)

    def __repr__(self) -> str:
        return f"TabularMDP(n_states={self.n_states}, n_actions={self.n_actions}, discount={self.discount})"

    @property
    def n_states(self) -> int:
        """Number of states."""
        return self.rewards.shape[0]

    @property
    def n_actions(self) -> int:
        """Number of actions."""
        return self.rewards.shape[1]

    def action_values(self, values: Array) -> Array:
        """
        One Bellman backup, ``r(s, a) + discount * E[(1 - done) V(s')]``.

        :param values: values V, ``(n_states,)``
        :return: action values, ``(n_states, n_actions)``
        """
        return self.rewards + self.kernel @ values


def random_mdp(
    n_states: int,
    n_actions: int,
    branching: int | None = None,
    n_terminal: int = 0,
    discount: float = 0.9,
    seed: int | None = None,
) -> TabularMDP:
    """
    A random MDP: each pair of state and action leads to ``branching`` states with random probabilities, and its reward is
    standard normal. ("Garnet" in the literature.)

    :param n_states: number of states
    :param n_actions: number of actions
    :param branching: number of next states of a pair; 1 is a deterministic MDP, None (the default) all states
    :param n_terminal: number of states, the last ones, that end the episode when they are entered
    :param discount: at least 0 and below 1
    :param seed: of the random numbers; None for a different MDP each time
    :return: the MDP
    :raises TypeError: if a number is not of its type
    :raises ValueError: if a number is outside its range
    """
    branching = n_states if branching is None else branching
    for name, value, minimum in (
        ("n_states", n_states, 1),
        ("n_actions", n_actions, 1),
        ("branching", branching, 1),
        ("n_terminal", n_terminal, 0),
    ):
        check_integer(name, value, minimum)
    for name, value in (("branching", branching), ("n_terminal", n_terminal)):
        if value > n_states:
            raise ValueError(f"{name} must be at most n_states, which is {n_states}, not {value!r}")
    rng = np.random.default_rng(seed)
    transitions = np.zeros((n_states, n_actions, n_states))
    for row in transitions.reshape(-1, n_states):
        row[rng.choice(n_states, branching, replace=False)] = rng.dirichlet(np.ones(branching))
    rewards = rng.standard_normal((n_states, n_actions))
    return TabularMDP(transitions, rewards, discount, np.arange(n_states) >= n_states - n_terminal)


# --- regularised values and policies, over the last axis -------------------------------------------------------------


def soft_value(q_values: Array, temperature: float) -> Array:
    """
    Log-sum-exp value, ``temperature * log sum_a exp(q / temperature)``; the maximum at temperature 0.

    :param q_values: action values, ``(..., n_actions)``
    :param temperature: at least 0
    :return: values, ``(...)``
    """
    maximum = q_values.max(axis=-1)
    if temperature == 0:
        return maximum
    return maximum + temperature * np.log(_relative_weights(q_values, temperature).sum(axis=-1))


def mellowmax(q_values: Array, temperature: float) -> Array:
    """
    Log-mean-exp value, ``soft_value - temperature * log(n_actions)``; the maximum at temperature 0.

    :param q_values: action values, ``(..., n_actions)``
    :param temperature: at least 0
    :return: values, ``(...)``
    """
    return soft_value(q_values, temperature) - temperature * math.log(q_values.shape[-1])


def boltzmann_value(q_values: Array, temperature: float) -> Array:
    """
    Average of the action values under their Boltzmann policy; the maximum at temperature 0.

    :param q_values: action values, ``(..., n_actions)``
    :param temperature: at least 0
    :return: values, ``(...)``
    """
    return (boltzmann_policy(q_values, temperature) * q_values).sum(axis=-1)


def boltzmann_policy(q_values: Array, temperature: float) -> Array:
    """
    Policy ``softmax(q / temperature)``; at temperature 0 the greedy one, on the first of equal maxima.

    :param q_values: action values, ``(..., n_actions)``
    :param temperature: at least 0
    :return: probabilities, ``(..., n_actions)``
    """
    if temperature == 0:
        return np.eye(q_values.shape[-1])[q_values.argmax(axis=-1)]
    weights = _relative_weights(q_values, temperature)
    return weights / weights.sum(axis=-1, keepdims=True)


def scaled_log_policy(q_values: Array, temperature: float) -> Array:
    """
    ``temperature * log boltzmann_policy = q - soft_value``; at temperature 0 the negative action gap ``q - max q``.

    :param q_values: action values, ``(..., n_actions)``
    :param temperature: at least 0
    :return: scaled log-probabilities, ``(..., n_actions)``
    """
    gaps = q_values - q_values.max(axis=-1, keepdims=True)  # the maximum goes first, so that nothing large cancels
    return gaps - soft_value(gaps, temperature)[..., None]


def entropy(probabilities: Array) -> Array:
    """
    Entropy in nats.

    :param probabilities: ``(..., n_actions)``
    :return: entropies, ``(...)``
    """
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(axis=-1)


def _relative_weights(q_values: Array, temperature: float) -> Array:
    """Weights ``exp((q - max q) / temperature)`` in [0, 1], ``(..., n_actions)``."""
    with np.errstate(over="ignore"):  # a gap over a tiny temperature may be -inf: its weight is 0
        return np.exp((q_values - q_values.max(axis=-1, keepdims=True)) / temperature)


_OPERATORS = {"lse": soft_value, "mellowmax": mellowmax, "boltzmann": boltzmann_value}


# --- solutions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Solution:
    """
    Where an iteration ended.

    :param q_values: action values, or the preferences of a gap-increasing algorithm, ``(n_states, n_actions)``
    :param values: values V of the states, ``(n_states,)``
    :param policy: policy of these action values, ``(n_states, n_actions)``
    :param iterations: number of iterations that were made
    :param residual: largest change in the last iteration, relative where numbers are larger than 1
    :param converged: whether the residual came down to the tolerance
    """

    q_values: Array
    values: Array
    policy: Array
    iterations: int
    residual: float
    converged: bool


def _iterate(
    step: Callable[[State], State],
    state: State,
    observe: Callable[[State], tuple[Array, ...]],
    solution: Callable[[State], tuple[Array, Array, Array]],
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Takes steps until what is observed changes no more; the one loop of this module."""
    observed = observe(state)
    residual, iterations = math.inf, 0
    while residual >= tolerance and iterations < max_iterations:  # the tolerance 0 never ends it
        state = step(state)
        previous, observed = observed, observe(state)
        residual = max(
            float(np.abs(new - old).max() / max(1.0, np.abs(new).max())) for new, old in zip(observed, previous, strict=True)
        )
        iterations += 1
    converged = residual <= tolerance
    if not converged and tolerance > 0:
        warnings.warn(
            f"no convergence after {iterations} iterations: the residual is {residual:.3g}, the tolerance {tolerance:g} "
            "(raise max_iterations; tolerance=0 makes a fixed number of iterations, without this warning)",
            RuntimeWarning,
            stacklevel=3,
        )
    return Solution(*solution(state), iterations=iterations, residual=residual, converged=converged)


def _checked_start(mdp: TabularMDP, initial_q_values: ArrayLike | None, tolerance: float, max_iterations: int) -> Array:
    """The action values to start from, zeros unless they are given; checks the arguments that every iteration has."""
    _check_mdp(mdp)
    check_number("tolerance", tolerance, 0.0)
    check_integer("max_iterations", max_iterations, 1)
    initial = np.zeros_like(mdp.rewards) if initial_q_values is None else initial_q_values
    return _checked_array("initial_q_values", initial, mdp.rewards.shape)


def value_iteration(
    mdp: TabularMDP,
    temperature: float = 0.0,
    munchausen_alpha: float = 0.0,
    munchausen_clip: float = -math.inf,
    operator: Operator = "lse",
    initial_q_values: ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> Solution:
    """
    Iterates the update that the value-based algorithms share, with V one of three operators:
    ``q <- r + munchausen_alpha * max(q - V, munchausen_clip) + discount * E[(1 - done) V(s')]``.

    ==================================  ===============  ====================  =======================================
    algorithm                           ``temperature``  ``munchausen_alpha``  ``operator``
    ==================================  ===============  ====================  =======================================
    value iteration                     0                0                     any, all are the maximum at temperature 0
    advantage learning                  0                below 1               any
    soft value iteration                above 0          0                     ``"lse"``
    mellowmax value iteration           above 0          0                     ``"mellowmax"``
    Munchausen value iteration          above 0          below 1               ``"lse"``
    conservative value iteration (CVI)  above 0          below 1               ``"mellowmax"``, or another
    dynamic policy programming (DPP)    above 0          1                     ``"boltzmann"`` or ``"lse"``
    ==================================  ===============  ====================  =======================================

    With ``munchausen_alpha`` the q are *preferences*. For ``"lse"`` and ``"mellowmax"`` without a clip, their V and their
    policy are those of the same operator without the gap term at the temperature ``(1 - munchausen_alpha) * temperature``,
    and their action gaps are ``1 / (1 - munchausen_alpha)`` times as large. Without terminations the two operators have the
    same policies in every iteration.

    In DPP the preferences of suboptimal actions fall for ever, in the end by ``V* - Q*`` per iteration, while V and the
    policy converge to those of value iteration: there the residual is that of V and of the policy. To look at iteration
    k, ask for ``max_iterations=k, tolerance=0``.

    With ``"boltzmann"`` the update need not be a contraction (Asadi and Littman 2017): it may have several fixed points,
    or not converge.

    Munchausen: Vieillard et al. 2020, arXiv:2007.14430. CVI: Kozuno et al. 2019, PMLR 89. DPP: Azar et al. 2012, JMLR 13.
    Advantage learning: Bellemare et al. 2016, arXiv:1512.04860.

    :param mdp: the problem
    :param temperature: in the unit of the rewards, at least 0
    :param munchausen_alpha: weight of the gap term, in [0, 1]; below 1 at temperature 0, unless there is a clip
    :param munchausen_clip: lower bound of the gap term, at most 0; -inf for none
    :param operator: ``"lse"`` (log-sum-exp), ``"mellowmax"`` (log-mean-exp) or ``"boltzmann"`` (average)
    :param initial_q_values: where to start, ``(n_states, n_actions)``; zeros if None
    :param tolerance: of the residual, at least 0; 0 for exactly ``max_iterations``
    :param max_iterations: at least 1; a warning says when they did not suffice
    :return: q, ``V(q)`` and ``boltzmann_policy(q, temperature)``
    :raises TypeError: if an argument is not of its type
    :raises ValueError: if an argument is outside its range
    """
    initial = _checked_start(mdp, initial_q_values, tolerance, max_iterations)
    check_number("temperature", temperature, 0.0)
    check_number("munchausen_alpha", munchausen_alpha, 0.0, 1.0)
    if munchausen_clip != -math.inf:
        check_number("munchausen_clip", munchausen_clip, maximum=0.0)
    check_choice("operator", operator, get_args(Operator))
    drifts = munchausen_alpha == 1 and munchausen_clip == -math.inf
    if drifts and temperature == 0:
        raise ValueError(f"munchausen_alpha must be below 1 at temperature 0 without a clip, not {munchausen_alpha!r}")

    def value(q_values: Array) -> Array:
        return _OPERATORS[operator](q_values, temperature)

    def step(q_values: Array) -> Array:
        values = value(q_values)
        gaps = np.maximum(q_values - values[:, None], munchausen_clip)
        return mdp.action_values(values) + munchausen_alpha * gaps

    def observe(q_values: Array) -> tuple[Array, ...]:
        return (value(q_values), boltzmann_policy(q_values, temperature)) if drifts else (q_values,)

    def solution(q_values: Array) -> tuple[Array, Array, Array]:
        return q_values, value(q_values), boltzmann_policy(q_values, temperature)

    return _iterate(step, initial, observe, solution, tolerance, max_iterations)


def policy_evaluation(mdp: TabularMDP, policy: ArrayLike, temperature: float = 0.0) -> Array:
    """
    Values of a policy, with its entropy as a bonus: the exact solution of
    ``V = E_pi[r - temperature * log pi + discount * (1 - done) V(s')]``.

    :param mdp: the problem
    :param policy: probabilities, ``(n_states, n_actions)``
    :param temperature: weight of the entropy, at least 0; with 0, the policy's ordinary values
    :return: values, ``(n_states,)``; the action values are ``mdp.action_values`` of them
    :raises TypeError: if an argument is not of its type
    :raises ValueError: if an argument is outside its range, or the policy does not sum to 1
    """
    _check_mdp(mdp)
    check_number("temperature", temperature, 0.0)
    pi = _checked_array("policy", policy, mdp.rewards.shape)
    _check_distribution("policy", pi)
    rewards = (pi * mdp.rewards).sum(axis=1) + temperature * entropy(pi)
    kernel = np.einsum("sa,sat->st", pi, mdp.kernel)
    return np.linalg.solve(np.eye(mdp.n_states) - kernel, rewards)


def policy_iteration(
    mdp: TabularMDP,
    temperature: float = 0.0,
    initial_q_values: ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 1000,
) -> Solution:
    """
    Policy iteration, soft if the temperature is above 0: the Boltzmann (or greedy) policy of the action values, then the
    exact values of that policy, until nothing changes. It ends where :func:`value_iteration` does, in few iterations.

    :param mdp: the problem
    :param temperature: weight of the entropy, in the unit of the rewards, at least 0
    :param initial_q_values: their policy is the first, ``(n_states, n_actions)``; zeros if None
    :param tolerance: of the residual, at least 0; 0 for exactly ``max_iterations``
    :param max_iterations: at least 1; a warning says when they did not suffice
    :return: action values, their soft (or greatest) values, and their Boltzmann (or greedy) policy
    :raises TypeError: if an argument is not of its type
    :raises ValueError: if an argument is outside its range
    """
    initial = _checked_start(mdp, initial_q_values, tolerance, max_iterations)
    check_number("temperature", temperature, 0.0)

    def step(q_values: Array) -> Array:
        return mdp.action_values(policy_evaluation(mdp, boltzmann_policy(q_values, temperature), temperature))

    def observe(q_values: Array) -> tuple[Array, ...]:
        return (q_values,)

    def solution(q_values: Array) -> tuple[Array, Array, Array]:
        return q_values, soft_value(q_values, temperature), boltzmann_policy(q_values, temperature)

    return _iterate(step, initial, observe, solution, tolerance, max_iterations)


def mirror_descent(
    mdp: TabularMDP,
    kl_coef: float,
    ent_coef: float,
    initial_q_values: ArrayLike | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> Solution:
    """
    Mirror descent value iteration: each policy maximises its action values less ``kl_coef`` times its divergence from the
    one before and plus ``ent_coef`` times its entropy; one backup with the same terms evaluates it::

        pi_next ~ pi ** (kl_coef / (kl_coef + ent_coef)) * exp(q / (kl_coef + ent_coef))
        V       = E_pi_next[q] - kl_coef * KL(pi_next || pi) + ent_coef * H(pi_next)
        q_next  = r + discount * E[(1 - done) V(s')]

    The first policy is uniform. The limit is that of soft value iteration at temperature ``ent_coef``, and with
    ``ent_coef=0`` that of ordinary value iteration: the divergence changes the way, not the end. The policies are those of
    Munchausen value iteration with temperature ``kl_coef + ent_coef`` and alpha ``kl_coef / (kl_coef + ent_coef)``.

    Vieillard et al. 2020, "Leverage the Average", arXiv:2003.14089.

    :param mdp: the problem
    :param kl_coef: weight of the divergence from the policy before, at least 0
    :param ent_coef: weight of the entropy, at least 0; not both may be 0
    :param initial_q_values: where to start, ``(n_states, n_actions)``; zeros if None
    :param tolerance: of the residual of q and of the policy, at least 0; 0 for exactly ``max_iterations``
    :param max_iterations: at least 1; a warning says when they did not suffice
    :return: q, V and the next policy, as written above
    :raises TypeError: if an argument is not of its type
    :raises ValueError: if an argument is outside its range
    """
    initial = _checked_start(mdp, initial_q_values, tolerance, max_iterations)
    check_number("kl_coef", kl_coef, 0.0)
    check_number("ent_coef", ent_coef, 0.0)
    if kl_coef + ent_coef == 0:
        raise ValueError("kl_coef + ent_coef must be above 0; without regularisation, use value_iteration(mdp)")

    # A state is (q, log pi): action values and the policy before
    def log_policy(q_values: Array, log_previous: Array) -> Array:
        temperature = kl_coef + ent_coef
        return scaled_log_policy(q_values + kl_coef * log_previous, temperature) / temperature

    def value(q_values: Array, log_previous: Array) -> Array:
        log_next = log_policy(q_values, log_previous)
        return (np.exp(log_next) * (q_values - kl_coef * (log_next - log_previous) - ent_coef * log_next)).sum(axis=1)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return mdp.action_values(value(*state)), log_policy(*state)

    def observe(state: tuple[Array, Array]) -> tuple[Array, ...]:
        return state[0], np.exp(log_policy(*state))

    def solution(state: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return state[0], value(*state), np.exp(log_policy(*state))

    uniform = np.full_like(initial, -math.log(mdp.n_actions))
    return _iterate(step, (initial, uniform), observe, solution, tolerance, max_iterations)
