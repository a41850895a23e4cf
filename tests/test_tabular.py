"""Exact solutions of finite MDPs: hand-computed numbers, plain loops, and the identities between the algorithms."""

import doctest
import itertools
import math
import warnings
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch as th

from sb3_softq import operators, tabular
from sb3_softq.tabular import TabularMDP, mirror_descent, policy_evaluation, policy_iteration, random_mdp, value_iteration

OPERATORS = ("lse", "mellowmax", "boltzmann")
CONTINUING = random_mdp(n_states=10, n_actions=4, branching=3, seed=0)
EPISODIC = random_mdp(n_states=10, n_actions=4, branching=3, n_terminal=2, seed=1)
BOTH = pytest.mark.parametrize("mdp", [CONTINUING, EPISODIC], ids=["continuing", "episodic"])


def assert_equal(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def random_values(mdp, seed=2):
    return np.random.default_rng(seed).standard_normal((mdp.n_states, mdp.n_actions))


def gaps(q_values):
    return q_values.max(axis=1, keepdims=True) - q_values


# --- hand-computed numbers -------------------------------------------------------------------------------------------


def two_states(discount=0.8):
    """Staying earns 1 in state 0 and 2 in state 1; moving to the other state earns nothing."""
    transitions = [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    return TabularMDP(transitions, [[1, 0], [2, 0]], discount)


def game_of_two_states():
    """In state 0, going on earns 1, and giving up earns 5 and leads to state 1, which ends the episode."""
    transitions = [[[1, 0], [0, 1]], [[0, 1], [0, 1]]]
    return TabularMDP(transitions, [[1, 5], [0, 0]], 0.5, terminations=[False, True])


def game_of_one_state():
    """The same, where the end is a matter of the transition."""
    return TabularMDP([[[1], [1]]], [[1, 5]], 0.5, terminations=[[[0], [1]]])


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_hard_values_by_hand(solve):
    solution = solve(two_states())
    # Staying in state 1 is worth 2 / (1 - 0.8) = 10, and going there 0.8 * 10, more than 1 / (1 - 0.8) for staying in 0
    assert_equal(solution.values, [8, 10])
    assert_equal(solution.q_values, [[1 + 0.8 * 8, 8], [10, 0.8 * 8]])
    assert_equal(solution.policy, [[0, 1], [1, 0]], 0)
    assert solution.converged and solution.residual <= 1e-12
    # At the discount 0.3 it is not worth the way
    assert_equal(solve(two_states(0.3)).policy, [[1, 0], [1, 0]], 0)


@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_soft_values_by_hand(solve):
    # Nothing to earn but entropy: temperature * log(2) at every step
    solution = solve(TabularMDP([[[1], [1]]], [[0, 0]], 0.9), temperature=0.5)
    assert_equal(solution.values, [0.5 * math.log(2) / 0.1])
    assert_equal(solution.policy, [[0.5, 0.5]])
    # A bandit: exp(r) is (1, 3)
    solution = solve(TabularMDP([[[1], [1]]], [[0, math.log(3)]], 0.0), temperature=1.0)
    assert_equal(solution.values, [math.log(4)])
    assert_equal(solution.policy, [[0.25, 0.75]])


@pytest.mark.parametrize("game", [game_of_two_states, game_of_one_state])
@pytest.mark.parametrize("solve", [value_iteration, policy_iteration])
def test_nothing_is_earned_after_the_end(solve, game):
    # Going on for ever would be worth 2, giving up in the next step 1 + 0.5 * 5
    assert_equal(solve(game()).q_values[0], [3.5, 5])
    # The soft value solves V = log(exp(1 + V / 2) + exp(5)), with x = exp(V / 2): x^2 - e x - e^5 = 0
    value = 2 * math.log((math.e + math.sqrt(math.e**2 + 4 * math.e**5)) / 2)
    assert_equal(solve(game(), temperature=1.0).values[0], value)


def test_probability_of_termination():
    """An end with probability 0.25 is a discount of 0.75."""
    ends = replace(CONTINUING, discount=0.8, terminations=np.full((10, 4, 10), 0.25))
    assert_equal(value_iteration(ends, 0.3).q_values, value_iteration(replace(CONTINUING, discount=0.6), 0.3).q_values)


def test_advantage_learning_by_hand():
    # Values stay, gaps of 8 - 7.4 and 10 - 6.4 grow by 1 / (1 - 0.5)
    solution = value_iteration(two_states(), munchausen_alpha=0.5)
    assert_equal(solution.values, [8, 10])
    assert_equal(solution.q_values, [[8 - 2 * 0.6, 8], [10, 10 - 2 * 3.6]])


# --- against plain loops ---------------------------------------------------------------------------------------------


def loop_value(q_row, temperature, operator):
    """One state's value, without NumPy."""
    top = max(q_row)
    if temperature == 0:
        return top
    weights = [math.exp((q - top) / temperature) for q in q_row]
    if operator == "boltzmann":
        return sum(w * q for w, q in zip(weights, q_row, strict=True)) / sum(weights)
    soft = top + temperature * math.log(sum(weights))
    return soft - (temperature * math.log(len(q_row)) if operator == "mellowmax" else 0)


def loop_update(mdp, q_values, temperature=0.0, alpha=0.0, clip=-math.inf, operator="lse"):
    """One update of all pairs of state and action, without NumPy."""
    values = [loop_value(list(row), temperature, operator) for row in q_values]
    updated = np.zeros_like(q_values)
    for s, a in np.ndindex(q_values.shape):
        updated[s, a] = mdp.rewards[s, a] + alpha * max(q_values[s, a] - values[s], clip)
        for t in range(len(values)):
            goes_on = 1 - mdp.terminations[s, a, t]
            updated[s, a] += mdp.discount * mdp.transitions[s, a, t] * goes_on * values[t]
    return updated


SETTINGS: dict[str, dict] = {
    "hard": dict(),
    "soft": dict(temperature=0.3),
    "mellowmax": dict(temperature=0.3, operator="mellowmax"),
    "boltzmann": dict(temperature=0.3, operator="boltzmann"),
    "advantage": dict(alpha=0.9),
    "munchausen": dict(temperature=0.3, alpha=0.9),
    "clipped": dict(temperature=0.3, alpha=0.9, clip=-1.0),
    "cvi": dict(temperature=0.3, alpha=0.7, operator="mellowmax"),
    "cvi_boltzmann": dict(temperature=0.3, alpha=0.7, operator="boltzmann"),
    "dpp": dict(temperature=0.3, alpha=1.0, operator="boltzmann"),
    "dpp_lse": dict(temperature=0.3, alpha=1.0),
}


def munchausen_names(setting):
    names = {"alpha": "munchausen_alpha", "clip": "munchausen_clip"}
    return {names.get(name, name): value for name, value in setting.items()}


@BOTH
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_iterations_equal_a_plain_loop(setting, mdp):
    q_values = random_values(mdp)
    solution = None
    for k in range(1, 6):
        previous, q_values = q_values, loop_update(mdp, q_values, **setting)
        solution = value_iteration(
            mdp, **munchausen_names(setting), initial_q_values=random_values(mdp), max_iterations=k, tolerance=0
        )
        assert solution.iterations == k
        assert_equal(solution.q_values, q_values, 1e-12)
    temperature, operator = setting.get("temperature", 0.0), setting.get("operator", "lse")
    assert_equal(solution.values, [loop_value(list(row), temperature, operator) for row in q_values], 1e-12)
    assert_equal(solution.policy.sum(axis=1), np.ones(mdp.n_states))
    if setting.get("alpha") != 1:
        residual = np.abs(q_values - previous).max() / max(1, np.abs(q_values).max())
        assert solution.residual == pytest.approx(residual, rel=1e-6)


@BOTH
@pytest.mark.parametrize("setting", [s for s in SETTINGS.values() if s.get("alpha") != 1], ids=str)
def test_solution_is_a_fixed_point(setting, mdp):
    solution = value_iteration(mdp, **munchausen_names(setting))
    assert solution.converged
    assert_equal(solution.q_values, loop_update(mdp, solution.q_values, **setting))
    # From elsewhere too. (Which "boltzmann" does not promise, but does at this temperature.)
    other = value_iteration(mdp, **munchausen_names(setting), initial_q_values=10 * random_values(mdp))
    assert_equal(other.q_values, solution.q_values, 1e-9)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95])
def test_hard_solution_is_the_best_of_all_policies(discount):
    mdp = random_mdp(n_states=4, n_actions=3, n_terminal=1, discount=discount, seed=3)
    best = np.full(mdp.n_states, -np.inf)
    for actions in itertools.product(range(3), repeat=4):
        rewards = np.array([mdp.rewards[s, a] for s, a in enumerate(actions)])
        kernel = np.array([discount * mdp.transitions[s, a] * [1, 1, 1, 0] for s, a in enumerate(actions)])
        values = np.zeros(4)
        for _ in range(800):
            values = rewards + kernel @ values
        best = np.maximum(best, values)
    for solution in (value_iteration(mdp), policy_iteration(mdp)):
        assert_equal(solution.values, best)
        assert_equal(policy_evaluation(mdp, solution.policy), best)


@pytest.mark.parametrize("value", OPERATORS)
def test_a_full_buffer_and_the_operators_make_the_same_iteration(value):
    """All transitions of a deterministic episodic MDP, with their dones, as a replay buffer returns them."""
    mdp = random_mdp(n_states=10, n_actions=4, branching=1, n_terminal=3, seed=4)
    operator = {"lse": operators.soft_value, "mellowmax": operators.mellowmax, "boltzmann": operators.boltzmann_value}[value]
    states, actions = (index.ravel() for index in np.indices((10, 4)))
    next_states = mdp.transitions[states, actions].argmax(axis=1)
    dones = th.as_tensor(mdp.terminations[states, actions, next_states])[:, None]
    assert 0 < dones.sum() < len(dones)
    rewards = th.as_tensor(mdp.rewards[states, actions])[:, None]
    q_values = th.as_tensor(random_values(mdp))
    for _ in range(10):
        bonus = operators.gap_bonus(q_values[states], th.as_tensor(actions)[:, None], 0.3, -1.0, value=operator)
        next_values = operator(q_values[next_states], 0.3)
        targets = operators.bellman_target(rewards + 0.9 * bonus, dones, mdp.discount, next_values)
        q_values = targets.reshape(10, 4)
    solution = value_iteration(mdp, 0.3, 0.9, -1.0, value, random_values(mdp), tolerance=0, max_iterations=10)
    assert_equal(solution.q_values, q_values.numpy(), 1e-12)


# --- values, evaluation, policy iteration ----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("temperature", [0, 1e-3, 0.3, 10.0])
def test_policy_iteration_equals_value_iteration(temperature, mdp):
    by_policy = policy_iteration(mdp, temperature)
    by_value = value_iteration(mdp, temperature, tolerance=1e-14)
    for name in ("q_values", "values", "policy"):
        assert_equal(getattr(by_policy, name), getattr(by_value, name), 1e-9)
    assert by_policy.iterations < 15 < by_value.iterations


@BOTH
@pytest.mark.parametrize("temperature", [0, 0.3])
def test_policy_evaluation_equals_a_plain_loop(temperature, mdp):
    pi = tabular.boltzmann_policy(random_values(mdp), 0.5)
    pi[0] = [0, 0.5, 0.5, 0]  # 0 * log(0) is 0
    values = np.zeros(mdp.n_states)
    for _ in range(400):
        q_values = mdp.rewards + mdp.discount * ((1 - mdp.terminations) * mdp.transitions) @ values
        values = np.array(
            [
                sum(p * (q - temperature * math.log(p)) for p, q in zip(p_row, q_row, strict=True) if p > 0)
                for p_row, q_row in zip(pi, q_values, strict=True)
            ]
        )
    assert_equal(policy_evaluation(mdp, pi, temperature), values)


@BOTH
def test_soft_policy_is_the_best_of_its_temperature(mdp):
    solution = policy_iteration(mdp, 0.3)
    assert_equal(policy_evaluation(mdp, solution.policy, 0.3), solution.values)
    for seed in range(5):
        other = tabular.boltzmann_policy(solution.q_values + 0.1 * random_values(mdp, seed), 0.3)
        assert (policy_evaluation(mdp, other, 0.3) < solution.values).all()
    # It is not the best of another one
    assert (policy_evaluation(mdp, solution.policy) < value_iteration(mdp).values - 1e-3).all()


@BOTH
@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
def test_bounds_of_the_values(temperature, mdp):
    """The entropy adds between 0 and temperature * log(n_actions) to each step, and mellowmax as much less."""
    hard, soft, mellow, boltzmann = (
        value_iteration(mdp, t, operator=operator).values
        for t, operator in [(0, "lse"), (temperature, "lse"), (temperature, "mellowmax"), (temperature, "boltzmann")]
    )
    bound = temperature * math.log(mdp.n_actions) / (1 - mdp.discount)
    assert (np.abs(hard) <= np.abs(mdp.rewards).max() / (1 - mdp.discount)).all()
    assert ((hard < soft) & (soft <= hard + bound)).all()
    assert ((hard - bound <= mellow) & (mellow < hard)).all()
    assert ((mellow < boltzmann) & (boltzmann < hard)).all()


@BOTH
@pytest.mark.parametrize("operator", OPERATORS)
def test_small_temperature_approaches_zero(operator, mdp):
    for alpha in (0.0, 0.9):
        hard = value_iteration(mdp, 0, alpha)
        nearly = value_iteration(mdp, 1e-7, alpha, operator=operator)
        assert_equal(nearly.q_values, hard.q_values, 1e-5)
        assert_equal(nearly.policy, hard.policy)


# --- gap-increasing algorithms ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("operator", ["lse", "mellowmax"])
@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("temperature", [0, 0.5])
class TestGapIncrease:
    """Munchausen (lse), CVI (mellowmax) and advantage learning (temperature 0) at their fixed points."""

    @pytest.fixture
    def solutions(self, mdp, operator, alpha, temperature):
        preferences = value_iteration(mdp, temperature, alpha, operator=operator, tolerance=1e-14)
        return preferences, value_iteration(mdp, (1 - alpha) * temperature, operator=operator, tolerance=1e-14)

    def test_policy_and_value_are_optimal_at_the_smaller_temperature(self, solutions):
        preferences, optimal = solutions
        assert_equal(preferences.policy, optimal.policy)
        assert_equal(preferences.values, optimal.values)

    def test_action_gaps_grow(self, solutions, alpha):
        preferences, optimal = solutions
        assert gaps(optimal.q_values).max() > 1
        assert_equal(gaps(preferences.q_values), gaps(optimal.q_values) / (1 - alpha))

    def test_action_values_can_be_read_from_preferences(self, solutions, alpha):
        preferences, optimal = solutions
        q_values = (1 - alpha) * preferences.q_values + alpha * preferences.values[:, None]
        assert_equal(q_values, optimal.q_values)


@BOTH
def test_munchausen_with_extreme_clips(mdp):
    soft, munchausen = value_iteration(mdp, 0.3), value_iteration(mdp, 0.3, 0.9)
    assert_equal(value_iteration(mdp, 0.3, 0.9, munchausen_clip=0.0).q_values, soft.q_values)
    assert_equal(value_iteration(mdp, 0.3, 0.9, munchausen_clip=-1e6).q_values, munchausen.q_values)
    clipped = value_iteration(mdp, 0.3, 0.9, munchausen_clip=-1.0)
    bonus = 0.9 * (clipped.q_values - clipped.values[:, None]).clip(-1, 0)
    assert_equal(clipped.q_values - bonus, mdp.action_values(clipped.values))
    assert np.abs(clipped.q_values - munchausen.q_values).max() > 0.1 < np.abs(clipped.q_values - soft.q_values).max()


@BOTH
def test_alpha_one_with_a_clip_is_bounded(mdp):
    for temperature in (0, 0.3):
        solution = value_iteration(mdp, temperature, 1.0, munchausen_clip=-1.0)
        assert_equal(solution.q_values, loop_update(mdp, solution.q_values, temperature, 1.0, -1.0))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_cvi_has_the_policies_of_munchausen(alpha):
    """In every iteration, and preferences that differ by c <- discount * c + (discount - alpha) * temperature * log(A)."""
    mdp, temperature, constant = CONTINUING, 0.5, 0.0
    for k in range(1, 41):
        munchausen, cvi = (
            value_iteration(mdp, temperature, alpha, -math.inf, operator, random_values(mdp), 0, k)
            for operator in ("lse", "mellowmax")
        )
        constant = mdp.discount * constant + (mdp.discount - alpha) * temperature * math.log(mdp.n_actions)
        assert_equal(munchausen.policy, cvi.policy)
        assert_equal(munchausen.q_values, cvi.q_values + constant)


def test_cvi_differs_from_munchausen_where_episodes_end():
    munchausen, cvi = (value_iteration(EPISODIC, 0.5, 0.9, operator=operator) for operator in ("lse", "mellowmax"))
    assert np.abs(munchausen.policy - cvi.policy).max() > 0.01


# --- dynamic policy programming --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("operator", OPERATORS)
def test_dpp_converges_to_the_hard_optimum(operator, mdp):
    solution = value_iteration(mdp, 0.3, 1.0, operator=operator)
    hard = policy_iteration(mdp)
    assert solution.converged
    assert_equal(solution.values, hard.values, 1e-8)
    assert_equal(solution.policy, hard.policy, 1e-8)


@BOTH
@pytest.mark.parametrize("operator", OPERATORS)
def test_dpp_gaps_grow_linearly(operator, mdp):
    """Each iteration takes V* - Q* from the preferences, so that k of them take k times as much."""
    hard = policy_iteration(mdp)
    early, late = (value_iteration(mdp, 0.3, 1.0, operator=operator, tolerance=0, max_iterations=k) for k in (3000, 3100))
    assert (early.iterations, late.iterations) == (3000, 3100)
    assert_equal(gaps(late.q_values) - gaps(early.q_values), 100 * gaps(hard.q_values), 1e-5)
    assert_equal(late.q_values - early.q_values, -100 * gaps(hard.q_values), 1e-5)
    second = np.sort(gaps(late.q_values), axis=1)[:, 1]
    assert (second > 1).all()


def test_dpp_with_terminations_is_written_as_usual():
    """P <- P + T P - M P, with T P = r + discount * E[M P]."""
    mdp, preferences = EPISODIC, random_values(EPISODIC)
    for k in range(1, 21):
        weights = np.exp((preferences - preferences.max(axis=1, keepdims=True)) / 0.3)
        average = (weights * preferences).sum(axis=1) / weights.sum(axis=1)
        backup = mdp.rewards + mdp.discount * (mdp.transitions * (1 - mdp.terminations)) @ average
        preferences = preferences + backup - average[:, None]
        dpp = value_iteration(mdp, 0.3, 1.0, -math.inf, "boltzmann", random_values(mdp), 0, k)
        assert_equal(dpp.q_values, preferences)


# --- mirror descent --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_mirror_descent_is_munchausen(alpha, mdp):
    """In every iteration: the same policies, and action values without the scaled log-policy."""
    temperature, initial = 0.5, random_values(mdp)
    coefficients = dict(kl_coef=alpha * temperature, ent_coef=(1 - alpha) * temperature)
    # q' = q - alpha * temperature * log pi, with the uniform policy at first
    shifted = initial + alpha * temperature * math.log(mdp.n_actions)
    policy_before = tabular.boltzmann_policy(initial, temperature)
    for k in range(1, 41):
        munchausen = value_iteration(mdp, temperature, alpha, -math.inf, "lse", initial, 0, k)
        mirror = mirror_descent(mdp, **coefficients, initial_q_values=shifted, tolerance=0, max_iterations=k)
        assert_equal(mirror.policy, munchausen.policy)
        assert_equal(mirror.values, munchausen.values)
        assert_equal(mirror.q_values, munchausen.q_values - alpha * temperature * np.log(policy_before), 1e-9)
        policy_before = munchausen.policy


@BOTH
@pytest.mark.parametrize("kl_coef, ent_coef", [(0.0, 0.3), (0.5, 0.3), (5.0, 0.3), (1.0, 0.0)])
def test_mirror_descent_ends_at_the_entropy_regularised_optimum(kl_coef, ent_coef, mdp):
    mirror, optimal = mirror_descent(mdp, kl_coef, ent_coef), policy_iteration(mdp, ent_coef)
    assert mirror.converged
    for name in ("q_values", "values", "policy"):
        assert_equal(getattr(mirror, name), getattr(optimal, name), 1e-8)


@BOTH
def test_mirror_descent_takes_small_steps(mdp):
    """A policy moves less from the one before, the uniform one, where the divergence has more weight."""
    moves = []
    for kl_coef in (0.0, 1.0, 10.0, 100.0):
        policy = mirror_descent(mdp, kl_coef, 0.3, tolerance=0, max_iterations=1).policy
        moves.append(np.abs(policy - 0.25).max())
    assert moves == sorted(moves, reverse=True) and moves[0] > 10 * moves[-1] > 0


# --- primitives ------------------------------------------------------------------------------------------------------


def test_primitives_by_hand():
    q_values = np.array([0.0, math.log(3)])  # exp(q) is (1, 3)
    assert_equal(tabular.soft_value(q_values, 1.0), math.log(4))
    assert_equal(tabular.mellowmax(q_values, 1.0), math.log(2))
    assert_equal(tabular.boltzmann_policy(q_values, 1.0), [0.25, 0.75])
    assert_equal(tabular.boltzmann_policy(q_values, 0.5), [0.1, 0.9])
    assert_equal(tabular.boltzmann_value(q_values, 1.0), 0.75 * math.log(3))
    assert_equal(tabular.scaled_log_policy(q_values, 0.5), [0.5 * math.log(0.1), 0.5 * math.log(0.9)])
    assert_equal(tabular.entropy(np.array([0.25, 0.75])), 0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert_equal(tabular.entropy(np.array([[0.0, 1.0], [0.5, 0.5]])), [0, math.log(2)])
    assert_equal(tabular.boltzmann_policy(np.array([[1.0, 2.0, 2.0]]), 0), [[0, 1, 0]])
    assert_equal(tabular.scaled_log_policy(np.array([1.0, 3.0]), 0), [-2, 0])
    for value in (tabular.soft_value, tabular.mellowmax, tabular.boltzmann_value):
        assert_equal(value(np.array([[1.0, 3.0], [4.0, 2.0]]), 0), [3, 4])


@pytest.mark.parametrize("temperature", [1e-305, 1e-8, 1.0, 1e8])
def test_primitives_stay_finite(temperature):
    q_values = np.array([[1e6, -1e6, 1e6 - 1], [0, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = [f(q_values, temperature) for f in (tabular.mellowmax, tabular.boltzmann_value, tabular.soft_value)]
        policy, log_policy = (f(q_values, temperature) for f in (tabular.boltzmann_policy, tabular.scaled_log_policy))
        entropy = tabular.entropy(policy)
    assert np.isfinite([*values, entropy]).all() and np.isfinite([policy, log_policy]).all()
    assert (np.diff(values, axis=0) >= -1e-7).all()
    assert_equal(policy.sum(axis=1), [1, 1])
    assert (log_policy <= 0).all()
    if temperature <= 1e-8:
        assert_equal(log_policy[0], [0, -2e6, -1], 1e-12)
    # Nothing is lost next to 1e6
    assert_equal(tabular.scaled_log_policy(q_values[0] - 1e6, temperature), log_policy[0], 1e-14)


def test_extreme_rewards():
    mdp = replace(CONTINUING, rewards=1e6 * CONTINUING.rewards)
    solution = value_iteration(mdp, 1e-8, 0.9)
    assert solution.converged
    assert_equal(solution.values, 1e6 * value_iteration(CONTINUING).values, 1e-9)


# --- checks ----------------------------------------------------------------------------------------------------------


def test_iteration_reports_that_it_did_not_converge():
    with pytest.warns(RuntimeWarning, match="no convergence after 3 iterations") as caught:
        solution = value_iteration(CONTINUING, max_iterations=3)
    assert caught[0].filename == __file__
    assert not solution.converged and solution.iterations == 3 and solution.residual > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_iteration(CONTINUING, max_iterations=3, tolerance=0).iterations == 3
        # Exactly, also where nothing changes any more
        solution = value_iteration(game_of_one_state(), max_iterations=200, tolerance=0)
        assert solution.iterations == 200 and solution.residual == 0 and solution.converged


def test_tolerance_bounds_the_error():
    for tolerance in (1e-2, 1e-6):
        solution = value_iteration(CONTINUING, 0.3, tolerance=tolerance)
        scale = max(1, np.abs(solution.q_values).max())
        error = np.abs(solution.q_values - policy_iteration(CONTINUING, 0.3).q_values).max()
        assert tolerance / 10 < error <= tolerance * scale * CONTINUING.discount / (1 - CONTINUING.discount)


def test_mdp_cannot_be_changed():
    transitions = np.array(CONTINUING.transitions)
    mdp = TabularMDP(transitions, CONTINUING.rewards.astype(np.float32), 0.9)
    transitions[:] = 0
    assert_equal(mdp.transitions, CONTINUING.transitions)
    assert (mdp.n_states, mdp.n_actions, mdp.rewards.dtype, mdp.discount) == (10, 4, np.float64, 0.9)
    for array in (mdp.transitions, mdp.rewards, mdp.terminations, mdp.kernel):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(FrozenInstanceError):
        mdp.discount = 0.5


def test_random_mdp():
    first, again, other = (random_mdp(6, 3, branching=2, n_terminal=1, discount=0.7, seed=s) for s in (0, 0, 1))
    assert_equal(first.transitions, again.transitions, 0)
    assert_equal(first.rewards, again.rewards, 0)
    assert np.abs(first.rewards - other.rewards).max() > 0.1
    assert first.transitions.shape == (6, 3, 6) and first.discount == 0.7
    assert ((first.transitions > 0).sum(axis=2) == 2).all()
    assert ((random_mdp(6, 3, seed=0).transitions > 0).sum(axis=2) == 6).all()
    assert (first.terminations[..., 5] == 1).all() and (first.terminations[..., :5] == 0).all()
    assert (random_mdp(6, 3, seed=0).terminations == 0).all()


GOOD = np.full((2, 3, 2), 0.5)


def changed(array, index, value):
    array = np.array(array, dtype=float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(transitions=changed(GOOD, (1, 2, 0), 0.6)), r"transitions must sum to 1 .* transitions\[1, 2\] sums to 1.1"),
        (dict(transitions=0.9 * GOOD), r"transitions\[0, 0\] sums to 0.9"),
        (dict(transitions=changed(GOOD, (1, 2), (-0.5, 1.5))), r"transitions must be prob.* transitions\[1, 2, 0\] is -0.5"),
        (dict(transitions=changed(GOOD, (0, 1, 1), np.nan)), r"transitions must be finite.* transitions\[0, 1, 1\] is nan"),
        (dict(transitions=np.full((2, 3, 3), 1 / 3)), r"transitions must have the shape .*not \(2, 3, 3\)"),
        (dict(transitions=np.full((2, 2), 0.5)), r"transitions must have the shape .*not \(2, 2\)"),
        (dict(transitions=np.zeros((0, 3, 0))), "none of them 0"),
        (dict(transitions=[[[1.0], [0.5, 0.5]]]), "transitions must be an array"),
        (dict(rewards=np.zeros((3, 2))), r"rewards must have the shape \(2, 3\), not \(3, 2\)"),
        (dict(rewards=np.zeros(2)), r"rewards must have the shape \(2, 3\), not \(2,\)"),
        (dict(rewards=changed(np.zeros((2, 3)), (1, 0), np.inf)), r"rewards must be finite, but rewards\[1, 0\] is inf"),
        (dict(discount=1), r"discount must be at least 0 and below 1, not 1"),
        (dict(discount=1.01), "discount must be .*not 1.01"),
        (dict(discount=-0.1), "discount must be .*not -0.1"),
        (dict(discount=math.nan), "discount must be .*not nan"),
        (dict(terminations=np.zeros(3)), r"terminations must have the shape \(2, 3, 2\) or \(2,\), not \(3,\)"),
        (dict(terminations=np.zeros((2, 3))), r"terminations must have the shape .*not \(2, 3\)"),
        (dict(terminations=[0.0, 1.5]), r"terminations must be probabilities in \[0, 1\], but terminations\[1\] is 1.5"),
        (dict(terminations=[-1, 0]), r"terminations\[0\] is -1"),
    ],
)
def test_malformed_mdps_are_refused(arguments, message):
    good = dict(transitions=GOOD, rewards=np.zeros((2, 3)), discount=0.9)
    TabularMDP(**good)
    with pytest.raises(ValueError, match=message):
        TabularMDP(**{**good, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        dict(transitions=GOOD.astype(str)),
        dict(transitions=GOOD * 1j),
        dict(rewards=None),
        dict(rewards=[["a"] * 3] * 2),
        dict(discount="0.9"),
        dict(discount=True),
        dict(discount=None),
        dict(terminations="never"),
    ],
    ids=str,
)
def test_wrong_types_of_mdps_are_refused(arguments):
    good = dict(transitions=GOOD, rewards=np.zeros((2, 3)), discount=0.9)
    with pytest.raises(TypeError, match=next(iter(arguments))):
        TabularMDP(**{**good, **arguments})


def solve_mirror(mdp, **arguments):
    return mirror_descent(mdp, **{"kl_coef": 0.5, "ent_coef": 0.5, **arguments})


def evaluate_uniform(mdp, **arguments):
    return policy_evaluation(mdp, **{"policy": np.full((10, 4), 0.25), **arguments})


BAD_EVERYWHERE = [
    (dict(tolerance=-1e-9), ValueError),
    (dict(tolerance=math.inf), ValueError),
    (dict(tolerance="small"), TypeError),
    (dict(max_iterations=0), ValueError),
    (dict(max_iterations=10.0), TypeError),
    (dict(initial_q_values=np.zeros((4, 10))), ValueError),
    (dict(initial_q_values=np.full((10, 4), np.nan)), ValueError),
]
BAD_TEMPERATURES = [
    (dict(temperature=-0.1), ValueError),
    (dict(temperature=math.inf), ValueError),
    (dict(temperature=math.nan), ValueError),
    (dict(temperature="lin_0.1"), TypeError),
    (dict(temperature=True), TypeError),
]


@pytest.mark.parametrize(
    "function, arguments, error",
    [
        *((f, *case) for f in (value_iteration, policy_iteration, solve_mirror) for case in BAD_EVERYWHERE),
        *((f, *case) for f in (value_iteration, policy_iteration, evaluate_uniform) for case in BAD_TEMPERATURES),
        (value_iteration, dict(munchausen_alpha=1.1), ValueError),
        (value_iteration, dict(munchausen_alpha=-0.1), ValueError),
        (value_iteration, dict(munchausen_alpha=1.0), ValueError),  # at temperature 0
        (value_iteration, dict(munchausen_alpha=None), TypeError),
        (value_iteration, dict(munchausen_clip=0.1), ValueError),
        (value_iteration, dict(munchausen_clip=math.nan), ValueError),
        (value_iteration, dict(munchausen_clip=None), TypeError),
        (value_iteration, dict(operator="max"), ValueError),
        (value_iteration, dict(operator=tabular.mellowmax), TypeError),
        (solve_mirror, dict(kl_coef=-0.1), ValueError),
        (solve_mirror, dict(ent_coef=-0.1), ValueError),
        (solve_mirror, dict(kl_coef=0, ent_coef=0), ValueError),
        (solve_mirror, dict(kl_coef="auto"), TypeError),
        (evaluate_uniform, dict(policy=np.full((4, 10), 0.1)), ValueError),
        (evaluate_uniform, dict(policy=np.full((10, 4), 0.3)), ValueError),
        (evaluate_uniform, dict(policy=[[-0.5, 1.5, 0, 0]] * 10), ValueError),
    ],
)
def test_bad_arguments_are_refused(function, arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        function(CONTINUING, **arguments)


@pytest.mark.parametrize("function", [value_iteration, policy_iteration, solve_mirror, evaluate_uniform])
def test_the_problem_must_be_an_mdp(function):
    with pytest.raises(TypeError, match="mdp must be a TabularMDP"):
        function(np.zeros((10, 4, 10)))


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(n_states=0), ValueError),
        (dict(n_actions=0), ValueError),
        (dict(n_states=2.5), TypeError),
        (dict(branching=6), ValueError),
        (dict(branching=0), ValueError),
        (dict(n_terminal=6), ValueError),
        (dict(n_terminal=-1), ValueError),
        (dict(discount=1.0), ValueError),
    ],
    ids=str,
)
def test_bad_random_mdps_are_refused(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        random_mdp(**{"n_states": 5, "n_actions": 2, "seed": 0, **arguments})


def test_examples_in_the_documentation():
    results = doctest.testmod(tabular)
    assert results.attempted > 0 and results.failed == 0
