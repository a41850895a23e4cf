"""The operators against float64 oracles, hand-computed numbers and the identities between the algorithms."""

import itertools
import math
import os
import shutil

import numpy as np
import pytest
import torch as th

from sb3_softq import operators, tabular

TEMPERATURES = (0, 1e-8, 0.03, 1.0, 100.0)
VALUES = ("soft_value", "mellowmax", "boltzmann_value")
# name of the operator -> the same row by row in float64 NumPy; entropy and double_soft_value have no such namesake
ORACLES = {
    "soft_value": tabular.soft_value,
    "mellowmax": tabular.mellowmax,
    "boltzmann_value": tabular.boltzmann_value,
    "policy": tabular.boltzmann_policy,
    "scaled_log_policy": tabular.scaled_log_policy,
    "entropy": lambda q_values, temperature: tabular.entropy(tabular.boltzmann_policy(q_values, temperature)),
}
INVALID = {"policy": 0.0, "scaled_log_policy": -math.inf}  # what these give for an invalid action


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    """The function itself, or a compiled one. A graph break is an error; no C++ compiler is needed."""
    if request.param == "eager":
        yield lambda function: function
        return
    th.compiler.reset()
    yield lambda function: th.compile(function, backend="aot_eager", fullgraph=True)
    th.compiler.reset()


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)


def random_q_values(batch_size=16, n_actions=5, seed=0, dtype=th.float64, scale=1.0):
    generator = th.Generator().manual_seed(seed)
    return scale * th.randn(batch_size, n_actions, generator=generator, dtype=dtype)


def random_mask(batch_size=16, n_actions=5, seed=1):
    """Any number of valid actions from 1 to all of them."""
    generator = th.Generator().manual_seed(seed)
    mask = th.rand(batch_size, n_actions, generator=generator) < 0.5
    mask[th.arange(batch_size), th.randint(n_actions, (batch_size,), generator=generator)] = True
    mask[0] = th.arange(n_actions) == 2  # a single one
    mask[1] = True
    return mask


def assert_equal(actual, expected, tolerance=1e-10):
    expected = th.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    th.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def oracle(name, q_values, temperature, mask):
    """The operator in a loop over the rows, on the valid actions alone."""
    rows = []
    for q_row, valid in zip(q_values.double().numpy(), mask.numpy(), strict=True):
        result = ORACLES[name](q_row[valid], temperature)
        if name in INVALID:
            row = np.full(len(valid), INVALID[name])
            row[valid] = result
            rows.append(row)
        else:
            rows.append([result])
    return th.tensor(np.array(rows))


# --- oracles and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_float64_oracle(run, name, masked, dtype):
    q_values = random_q_values(dtype=dtype)
    mask = random_mask() if masked else None
    function = run(getattr(operators, name))
    for temperature in TEMPERATURES:
        result = function(q_values, temperature, mask)
        assert result.dtype == dtype
        expected = oracle(name, q_values, temperature, th.ones_like(q_values, dtype=th.bool) if mask is None else mask)
        # At temperature 100, float32 holds 100 * log-probability to 1e-4 or so
        assert_equal(result, expected, 1e-12 if dtype == th.float64 else 1e-5 * max(1.0, temperature))


def test_hand_computed_numbers():
    # exp(q) is (1, 3): their sum is 4, the probabilities 1/4 and 3/4
    q_values = th.tensor([[0.0, math.log(3.0)]], dtype=th.float64)
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert_equal(operators.soft_value(q_values, 1.0), [[math.log(4)]])
    assert_equal(operators.mellowmax(q_values, 1.0), [[math.log(2)]])
    assert_equal(operators.policy(q_values, 1.0), [[0.25, 0.75]])
    assert_equal(operators.scaled_log_policy(q_values, 1.0), [[math.log(0.25), math.log(0.75)]])
    assert_equal(operators.boltzmann_value(q_values, 1.0), [[0.75 * math.log(3)]])
    assert_equal(operators.entropy(q_values, 1.0), [[entropy]])
    # At half the temperature exp(2 q) is (1, 9), and at temperature 0 only the maximum counts
    assert_equal(operators.soft_value(q_values, 0.5), [[0.5 * math.log(10)]])
    assert_equal(operators.policy(q_values, 0.5), [[0.1, 0.9]])
    assert_equal(operators.scaled_log_policy(q_values, 0.5), [[0.5 * math.log(0.1), 0.5 * math.log(0.9)]])
    assert_equal(operators.scaled_log_policy(q_values, 0), [[-math.log(3), 0.0]])
    # The policy (1/4, 3/4) on the values (2, 6), with its entropy
    assert_equal(operators.double_soft_value(q_values, q_values.new_tensor([[2.0, 6.0]]), 1.0), [[5.0 + entropy]])


def test_hand_computed_target():
    # Munchausen with alpha 0.5, temperature 1 and the clip -1: log(1/4) = -1.386 is clipped, log(3/4) = -0.288 is not
    q_values = th.tensor([[0.0, math.log(3.0)]] * 3, dtype=th.float64)
    actions = th.tensor([[0], [1], [1]])
    rewards = th.tensor([[1.0], [2.0], [3.0]], dtype=th.float64)
    dones = th.tensor([[0.0], [0.0], [1.0]], dtype=th.float64)
    bonus = operators.gap_bonus(q_values, actions, 1.0, clip=-1.0)
    assert_equal(bonus, [[-1.0], [math.log(0.75)], [math.log(0.75)]])
    target = operators.bellman_target(rewards + 0.5 * bonus, dones, 0.9, operators.soft_value(q_values, 1.0))
    value = 0.9 * math.log(4)
    # The last transition is terminal: it keeps its bonus, and nothing of the next value
    assert_equal(target, [[0.5 + value], [2.0 + 0.5 * math.log(0.75) + value], [3.0 + 0.5 * math.log(0.75)]])


@pytest.mark.parametrize("name", [*ORACLES, "gap_bonus"])
def test_temperature_tensor_has_one_temperature_per_row(run, name):
    q_values, mask = random_q_values(), random_mask()
    actions = mask.int().argmax(dim=1, keepdim=True)
    temperature = th.linspace(0.1, 3.0, len(q_values), dtype=th.float64)[:, None]

    def function(q_values, temperature, mask):
        if name == "gap_bonus":
            return operators.gap_bonus(q_values, actions[: len(q_values)], temperature, -0.5, mask, operators.mellowmax)
        return getattr(operators, name)(q_values, temperature, mask)

    result = run(function)(q_values, temperature, mask)
    for i in range(len(q_values)):
        row = slice(i, i + 1)
        if name == "gap_bonus":
            expected = operators.gap_bonus(
                q_values[row], actions[row], float(temperature[i]), -0.5, mask[row], operators.mellowmax
            )
        else:
            expected = function(q_values[row], float(temperature[i]), mask[row])
        assert_equal(result[row], expected)
    scalar = run(function)(q_values, th.tensor(0.7, dtype=th.float64), mask)
    assert_equal(scalar, function(q_values, 0.7, mask))


def test_compiled_follows_a_temperature_schedule(run):
    """A number that changes is not baked into the graph, and reaching 0 switches to the hard limit."""
    q_values = random_q_values()
    function = run(operators.soft_value)
    for temperature in (1.0, 0.7, 0.35, 0.01, 0.0, 0.2):
        assert_equal(function(q_values, temperature), oracle("soft_value", q_values, temperature, q_values == q_values))


def munchausen_target(q_values, actions, rewards, next_q_values, dones, mask):
    bonus = operators.gap_bonus(q_values, actions, 0.03, clip=-1.0)
    next_values = operators.soft_value(next_q_values, 0.03, mask)
    return operators.bellman_target(rewards + 0.9 * bonus, dones, 0.99, next_values)


@pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++", "cl")),
    reason="inductor needs a C++ compiler",
)
def test_inductor_computes_the_munchausen_target():
    n = 16
    q_values, next_q_values = random_q_values(n, dtype=th.float32), random_q_values(n, seed=1, dtype=th.float32)
    arguments = (
        q_values,
        th.arange(n)[:, None] % 5,
        random_q_values(n, 1, seed=2, dtype=th.float32),
        next_q_values,
        (th.arange(n)[:, None] % 3 == 0).float(),
        random_mask(n),
    )
    compiled = th.compile(munchausen_target, fullgraph=True)(*arguments)
    assert_equal(compiled, munchausen_target(*arguments), 1e-5)
    q, actions, rewards, next_q, dones, mask = arguments
    tau_log_policy = oracle("scaled_log_policy", q, 0.03, th.ones_like(mask)).gather(1, actions)
    value = oracle("soft_value", next_q, 0.03, mask)
    assert_equal(compiled, rewards + 0.9 * tau_log_policy.clamp(min=-1) + 0.99 * (1 - dones) * value, 1e-5)


# --- the hard limit, masks, extremes ---------------------------------------------------------------------------------


def test_temperature_zero_is_the_hard_limit(run):
    q_values = th.tensor([[1.0, 4.0, 4.0], [-1.0, -3.0, -2.0]])
    maximum = th.tensor([[4.0], [-1.0]])
    for zero in (0, 0.0):
        for name in VALUES:
            assert_equal(run(getattr(operators, name))(q_values, zero), maximum, 0)
        # The first of equal maxima
        assert_equal(run(operators.policy)(q_values, zero), [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 0)
        assert_equal(run(operators.scaled_log_policy)(q_values, zero), q_values - maximum, 0)
        assert_equal(run(operators.entropy)(q_values, zero), th.zeros(2, 1), 0)
    # With a mask, the maximum of what is valid
    mask = th.tensor([[True, False, False], [False, True, True]])
    for name in VALUES:
        assert_equal(run(getattr(operators, name))(q_values, 0, mask), [[1.0], [-2.0]], 0)
    assert_equal(run(operators.policy)(q_values, 0, mask), [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 0)


@pytest.mark.parametrize("name", ORACLES)
def test_small_temperature_approaches_zero(name):
    """Without ties: a limit, and not only a case of its own."""
    q_values, mask = random_q_values(), random_mask()
    function = getattr(operators, name)
    assert_equal(function(q_values, 1e-8, mask), function(q_values, 0, mask), 1e-7)


@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("name", [*ORACLES, "double_soft_value", "gap_bonus"])
def test_values_of_invalid_actions_do_not_matter(name, temperature):
    q_values, mask = random_q_values(), random_mask()
    actions = mask.int().argmax(dim=1, keepdim=True)

    def function(q_values):
        if name == "double_soft_value":
            return operators.double_soft_value(q_values, -q_values, temperature, mask)
        if name == "gap_bonus":
            return operators.gap_bonus(q_values, actions, temperature, mask=mask, value=operators.boltzmann_value)
        return getattr(operators, name)(q_values, temperature, mask)

    assert not mask.all()
    for other in (1e9, -1e9, math.inf, math.nan):
        assert_equal(function(q_values.masked_fill(~mask, other)), function(q_values))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_single_valid_action_has_its_own_value(temperature):
    q_values = random_q_values()
    mask = th.zeros_like(q_values, dtype=th.bool)
    mask[:, 3] = True
    for name in VALUES:
        assert_equal(getattr(operators, name)(q_values, temperature, mask), q_values[:, 3:4])
    assert_equal(operators.double_soft_value(-q_values, q_values, temperature, mask), q_values[:, 3:4])
    assert_equal(operators.entropy(q_values, temperature, mask), th.zeros(len(q_values), 1), 0)
    assert_equal(operators.policy(q_values, temperature, mask), mask.double(), 0)
    log_policy = operators.scaled_log_policy(q_values, temperature, mask)
    assert_equal(log_policy, th.zeros_like(q_values).masked_fill(~mask, -math.inf), 0)
    # And so has the only action that there is
    assert_equal(operators.soft_value(q_values[:, :1], temperature), q_values[:, :1])


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("temperature", [0, 1e-8, 1e-3, 1.0, 1e8])
def test_extreme_values_stay_finite(temperature, dtype):
    q_values = th.tensor([[1e6, -1e6, 0.0], [-1e6, -1e6, -1e6], [1e6, 1e6 - 1, 1e6]], dtype=dtype)
    mask = th.tensor([[True, True, True], [False, True, False], [True, True, False]])
    relative = 1e-6 if dtype == th.float32 else 1e-14
    slack = relative * (1e6 + temperature)
    maximum = q_values.masked_fill(~mask, -math.inf).amax(dim=1, keepdim=True)
    for valid in (None, mask):
        top = q_values.amax(dim=1, keepdim=True) if valid is None else maximum
        soft, mellow, boltzmann = (getattr(operators, name)(q_values, temperature, valid) for name in VALUES)
        assert (mellow <= boltzmann + slack).all() and (boltzmann <= top + slack).all()
        assert (top <= soft + slack).all() and (soft <= top + temperature * math.log(3) + slack).all()
        pi = operators.policy(q_values, temperature, valid)
        assert_equal(pi.sum(dim=1), [1.0, 1.0, 1.0], 1e-6)
        assert (pi >= 0).all()
        log_policy = operators.scaled_log_policy(q_values, temperature, valid)
        assert (log_policy <= 0).all()
        assert th.equal(log_policy.isfinite(), mask | (valid is None))
        entropy = operators.entropy(q_values, temperature, valid)
        assert ((entropy >= 0) & (entropy <= math.log(3) + 1e-6)).all()


def test_log_policy_does_not_underflow():
    """At the temperature 0.03, a gap of 10 is a probability of exp(-333): 0 in float32, and log(0) its trap."""
    q_values = th.tensor([[0.0, 10.0]])
    assert operators.policy(q_values, 0.03)[0, 0] == 0
    assert_equal(operators.scaled_log_policy(q_values, 0.03), [[-10.0, 0.0]], 1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ORACLES, "double_soft_value", "kl_divergence"])
def test_gradients_are_right(name):
    def function(q_values, other):
        if name == "double_soft_value":
            return operators.double_soft_value(q_values, other, 0.7)
        if name == "kl_divergence":
            return operators.kl_divergence(q_values.log_softmax(dim=1), other.log_softmax(dim=1))
        return getattr(operators, name)(q_values, 0.7)

    q_values = random_q_values(3, 4).requires_grad_()
    other = random_q_values(3, 4, seed=1).requires_grad_(name in ("double_soft_value", "kl_divergence"))
    assert th.autograd.gradcheck(function, (q_values, other))


@pytest.mark.parametrize("temperature", [1e-8, 0.5])
@pytest.mark.parametrize("name", [*ORACLES, "double_soft_value", "gap_bonus", "kl_divergence"])
def test_gradients_are_finite_and_zero_for_invalid_actions(run, name, temperature):
    mask = random_mask()
    actions = mask.int().argmax(dim=1, keepdim=True)
    weights = random_q_values(seed=2)

    def function(q_values):
        if name == "double_soft_value":
            return operators.double_soft_value(q_values, q_values.square(), temperature, mask)
        if name == "gap_bonus":
            return operators.gap_bonus(q_values, actions, temperature, -0.5, mask, operators.mellowmax)
        if name == "kl_divergence":
            log_policy = operators.scaled_log_policy(q_values, 1.0, mask)
            return operators.kl_divergence(log_policy, operators.scaled_log_policy(2 * q_values, 1.0, mask), mask)
        result = getattr(operators, name)(q_values, temperature, mask)
        return result.masked_fill(~mask, 0.0) * weights if name in INVALID else result

    q_values = random_q_values().requires_grad_()
    (gradient,) = th.autograd.grad(run(function)(q_values).sum(), q_values)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    if name in VALUES or temperature == 0.5:
        assert gradient.abs().max() > 0


def test_gradient_of_the_soft_value_is_the_policy():
    q_values, mask = random_q_values().requires_grad_(), random_mask()
    for value in (operators.soft_value, operators.mellowmax):
        (gradient,) = th.autograd.grad(value(q_values, 0.3, mask).sum(), q_values)
        assert_equal(gradient, operators.policy(q_values.detach(), 0.3, mask))


# --- identities of the values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, random_mask()], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [0.03, 1.0, 30.0])
class TestIdentities:
    def test_soft_value_is_average_plus_entropy(self, temperature, mask):
        q_values = random_q_values()
        soft = operators.soft_value(q_values, temperature, mask)
        entropy = operators.entropy(q_values, temperature, mask)
        assert_equal(soft, operators.boltzmann_value(q_values, temperature, mask) + temperature * entropy)

    def test_soft_value_is_an_expectation(self, temperature, mask):
        """E_pi[q - temperature * log pi], the form in which Munchausen DQN is written."""
        q_values = random_q_values()
        valid = th.ones_like(q_values, dtype=th.bool) if mask is None else mask
        pi = operators.policy(q_values, temperature, mask)
        log_policy = operators.scaled_log_policy(q_values, temperature, mask).masked_fill(~valid, 0.0)
        expectation = (pi * (q_values - log_policy)).sum(dim=1, keepdim=True)
        assert_equal(operators.soft_value(q_values, temperature, mask), expectation)

    def test_log_policy_is_the_gap_to_the_soft_value(self, temperature, mask):
        q_values = random_q_values()
        gap = q_values - operators.soft_value(q_values, temperature, mask)
        if mask is not None:
            gap = gap.masked_fill(~mask, -math.inf)
        log_policy = operators.scaled_log_policy(q_values, temperature, mask)
        assert_equal(log_policy, gap)
        assert_equal((log_policy / temperature).exp(), operators.policy(q_values, temperature, mask))

    def test_mellowmax_is_regularised_towards_the_uniform_policy(self, temperature, mask):
        q_values = random_q_values()
        valid = th.ones_like(q_values, dtype=th.bool) if mask is None else mask
        log_policy = operators.scaled_log_policy(q_values, temperature, mask) / temperature
        uniform = operators.scaled_log_policy(th.zeros_like(q_values), 1.0, mask)
        assert_equal(uniform.exp(), valid.double() / valid.sum(dim=1, keepdim=True))
        divergence = operators.kl_divergence(log_policy, uniform, mask)
        expected = operators.boltzmann_value(q_values, temperature, mask) - temperature * divergence
        assert_equal(operators.mellowmax(q_values, temperature, mask), expected)

    def test_order_of_the_values(self, temperature, mask):
        """mean <= mellowmax <= Boltzmann <= max <= log-sum-exp <= max + temperature * log(n_actions)"""
        q_values = random_q_values()
        valid = th.ones_like(q_values, dtype=th.bool) if mask is None else mask
        soft, mellow, boltzmann = (getattr(operators, name)(q_values, temperature, mask) for name in VALUES)
        maximum = operators.soft_value(q_values, 0, mask)
        n_valid = valid.sum(dim=1, keepdim=True)
        mean = q_values.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True) / n_valid
        ascending = (mean, mellow, boltzmann, maximum, soft, maximum + temperature * n_valid.log())
        for lower, upper in itertools.pairwise(ascending):
            assert (lower <= upper + 1e-10).all()
            assert (lower < upper - 1e-10).any()  # no two of them are the same function

    def test_shift(self, temperature, mask):
        """A constant added to a state's action values is added to its value and leaves the policy alone."""
        q_values, constant = random_q_values(), random_q_values(16, 1, seed=3, scale=10.0)
        for name in VALUES:
            value = getattr(operators, name)
            assert_equal(value(q_values + constant, temperature, mask), value(q_values, temperature, mask) + constant)
        for name in ("policy", "scaled_log_policy", "entropy"):
            function = getattr(operators, name)
            assert_equal(function(q_values + constant, temperature, mask), function(q_values, temperature, mask))

    def test_scale(self, temperature, mask):
        """The temperature has the unit of the action values."""
        q_values = random_q_values()
        for name in (*VALUES, "scaled_log_policy"):
            function = getattr(operators, name)
            assert_equal(function(7 * q_values, 7 * temperature, mask), 7 * function(q_values, temperature, mask))
        for name in ("policy", "entropy"):
            function = getattr(operators, name)
            assert_equal(function(7 * q_values, 7 * temperature, mask), function(q_values, temperature, mask))

    def test_no_policy_has_more_than_the_soft_value(self, temperature, mask):
        q_values, other = random_q_values(), random_q_values(seed=4)
        value = operators.boltzmann_value(q_values, temperature, mask)
        value = value + temperature * operators.entropy(q_values, temperature, mask)
        pi = operators.policy(other, temperature, mask)
        other_value = (pi * q_values).sum(dim=1, keepdim=True) + temperature * operators.entropy(other, temperature, mask)
        assert (other_value <= value + 1e-10).all()
        assert (other_value < value - 1e-6).any()

    def test_contraction(self, temperature, mask):
        """Log-sum-exp and mellowmax move by no more than the action values."""
        q_values = random_q_values()
        other = q_values + random_q_values(seed=5, scale=0.1)
        distance = (q_values - other).abs().amax(dim=1, keepdim=True)
        for value in (operators.soft_value, operators.mellowmax):
            change = (value(q_values, temperature, mask) - value(other, temperature, mask)).abs()
            assert (change <= distance + 1e-10).all()


def test_boltzmann_value_is_no_contraction():
    q_values, other = th.tensor([[0.0, 2.4]], dtype=th.float64), th.tensor([[0.0, 2.5]], dtype=th.float64)
    change = operators.boltzmann_value(other, 1.0) - operators.boltzmann_value(q_values, 1.0)
    assert change.item() > 1.05 * 0.1


def test_large_temperature_is_the_mean():
    q_values = random_q_values()
    mean = q_values.mean(dim=1, keepdim=True)
    assert_equal(operators.mellowmax(q_values, 1e6), mean, 1e-5)
    assert_equal(operators.boltzmann_value(q_values, 1e6), mean, 1e-5)
    assert_equal(operators.soft_value(q_values, 1e6) - 1e6 * math.log(5), mean, 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 2.0])
def test_soft_target_is_close_to_the_hard_one(temperature):
    """0 <= soft - hard target <= discount * temperature * log(n_actions)"""
    rewards, dones = random_q_values(16, 1, seed=6), th.zeros(16, 1, dtype=th.float64)
    next_q_values = random_q_values()
    soft, hard = (
        operators.bellman_target(rewards, dones, 0.9, operators.soft_value(next_q_values, t)) for t in (temperature, 0)
    )
    assert (hard <= soft).all() and (soft - hard <= 0.9 * temperature * math.log(5)).all()


def test_factored_actions_have_the_sum_of_the_soft_values():
    """A joint action of independent heads, with the sum of their values, as in a MultiDiscrete space."""
    first, second = random_q_values(16, 3), random_q_values(16, 4, seed=1)
    joint = (first[:, :, None] + second[:, None, :]).flatten(start_dim=1)
    for name in (*VALUES, "entropy"):
        function = getattr(operators, name)
        assert_equal(function(joint, 0.4), function(first, 0.4) + function(second, 0.4))
    log_joint = operators.scaled_log_policy(first, 0.4)[:, :, None] + operators.scaled_log_policy(second, 0.4)[:, None, :]
    assert_equal(operators.scaled_log_policy(joint, 0.4), log_joint.flatten(start_dim=1))


# --- double soft values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, random_mask()], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [0.03, 1.0])
def test_double_soft_value_is_the_expectation_of_the_other_network(run, temperature, mask):
    q_values, evaluation = random_q_values(), random_q_values(seed=1)
    double = run(operators.double_soft_value)(q_values, evaluation, temperature, mask)
    pi = operators.policy(q_values, temperature, mask)
    entropy = operators.entropy(q_values, temperature, mask)
    assert_equal(double, (pi * evaluation).sum(dim=1, keepdim=True) + temperature * entropy)


@pytest.mark.parametrize("mask", [None, random_mask()], ids=["all", "masked"])
def test_double_soft_value_at_zero_is_double_dqn(run, mask):
    q_values, evaluation = random_q_values(), random_q_values(seed=1)
    valid = q_values if mask is None else q_values.masked_fill(~mask, -math.inf)
    expected = evaluation.gather(1, valid.argmax(dim=1, keepdim=True))
    assert_equal(run(operators.double_soft_value)(q_values, evaluation, 0, mask), expected)
    assert_equal(operators.double_soft_value(q_values, evaluation, 1e-8, mask), expected, 1e-6)


@pytest.mark.parametrize("temperature", [0, 0.03, 1.0])
def test_double_soft_value_of_equal_networks_is_the_single_one(temperature):
    q_values, mask = random_q_values(), random_mask()
    double = operators.double_soft_value(q_values, q_values.clone(), temperature, mask)
    assert_equal(double, operators.soft_value(q_values, temperature, mask))


# --- gap terms and targets -------------------------------------------------------------------------------------------


class TestTargets:
    """Targets of the algorithms, and where they meet."""

    q_values = random_q_values()
    next_q_values = random_q_values(seed=1)
    rewards = random_q_values(16, 1, seed=2)
    actions = th.arange(16)[:, None] % 5
    dones = (th.arange(16)[:, None] % 4 == 0).double()
    discount = 0.9

    def target(self, alpha, temperature, clip=-math.inf, value=operators.soft_value):
        bonus = operators.gap_bonus(self.q_values, self.actions, temperature, clip, value=value)
        next_values = value(self.next_q_values, temperature, None)
        return operators.bellman_target(self.rewards + alpha * bonus, self.dones, self.discount, next_values)

    def taken(self, values):
        return values.gather(1, self.actions)

    def test_munchausen_forms(self):
        """The form of the code, sum pi (q - tau log pi), and r + alpha (q - lse q) + gamma lse q'."""
        soft = operators.soft_value(self.q_values, 0.5)
        next_soft = operators.soft_value(self.next_q_values, 0.5)
        short = self.rewards + 0.9 * (self.taken(self.q_values) - soft) + self.discount * (1 - self.dones) * next_soft
        assert_equal(self.target(0.9, 0.5), short)
        pi = th.softmax(self.next_q_values / 0.5, dim=1)
        next_value = (pi * (self.next_q_values - 0.5 * pi.log())).sum(dim=1, keepdim=True)
        log_pi = self.taken(th.softmax(self.q_values / 0.5, dim=1).log())
        long = self.rewards + 0.9 * 0.5 * log_pi + self.discount * (1 - self.dones) * next_value
        assert_equal(self.target(0.9, 0.5), long)

    def test_munchausen_at_zero_is_advantage_learning(self):
        gap = self.taken(self.q_values) - self.q_values.amax(dim=1, keepdim=True)
        next_value = self.next_q_values.amax(dim=1, keepdim=True)
        expected = self.rewards + 0.9 * gap + self.discount * (1 - self.dones) * next_value
        for name in VALUES:
            assert_equal(self.target(0.9, 0, value=getattr(operators, name)), expected)
        assert_equal(self.target(0.9, 1e-8), expected, 1e-6)

    def test_no_bonus_is_soft_dqn(self):
        next_value = operators.soft_value(self.next_q_values, 0.5)
        soft_dqn = operators.bellman_target(self.rewards, self.dones, self.discount, next_value)
        assert_equal(self.target(0.0, 0.5), soft_dqn)
        assert_equal(self.target(0.9, 0.5, clip=0.0), soft_dqn)
        assert (self.target(0.9, 0.5) - soft_dqn).abs().max() > 0.1

    def test_bonus_range_and_clip(self):
        soft = operators.soft_value(self.q_values, 0.5)
        unclipped = operators.gap_bonus(self.q_values, self.actions, 0.5)
        clipped = operators.gap_bonus(self.q_values, self.actions, 0.5, clip=-1.0)
        assert ((clipped >= -1) & (clipped <= 0)).all()
        active = self.taken(self.q_values) < soft - 1
        assert active.any() and not active.all()
        assert_equal(clipped, th.where(active, -1.0, unclipped))

    def test_bonus_is_shift_invariant(self):
        for name in VALUES:
            for temperature in (0, 0.5):
                value = getattr(operators, name)
                bonus = operators.gap_bonus(self.q_values, self.actions, temperature, -1.0, value=value)
                shifted = operators.gap_bonus(self.q_values + 3.0, self.actions, temperature, -1.0, value=value)
                assert_equal(shifted, bonus)

    def test_greedy_action_has_no_gap_at_zero(self):
        greedy = self.q_values.argmax(dim=1, keepdim=True)
        assert_equal(operators.gap_bonus(self.q_values, greedy, 0), th.zeros(16, 1), 0)

    def test_mellowmax_differs_by_constants(self):
        """CVI is Munchausen plus constants: of the gap term, and of the next value where there is one."""
        constant = 0.5 * math.log(5)
        expected = self.target(0.9, 0.5) + 0.9 * constant - self.discount * (1 - self.dones) * constant
        assert_equal(self.target(0.9, 0.5, value=operators.mellowmax), expected)
        # Its gap can be positive, and then is not clipped
        gap = operators.gap_bonus(self.q_values, self.actions, 0.5, -1.0, value=operators.mellowmax)
        soft_gap = self.taken(self.q_values) - operators.soft_value(self.q_values, 0.5)
        assert_equal(gap, (soft_gap + constant).clamp(min=-1.0))
        assert (gap > 0).any()

    def test_dynamic_policy_programming(self):
        """P - M P of the Boltzmann average has mean 0 under the policy."""
        gaps = th.cat(
            [
                operators.gap_bonus(self.q_values, th.full_like(self.actions, a), 0.5, value=operators.boltzmann_value)
                for a in range(5)
            ],
            dim=1,
        )
        pi = operators.policy(self.q_values, 0.5)
        assert_equal(gaps, self.q_values - (pi * self.q_values).sum(dim=1, keepdim=True))
        assert_equal((pi * gaps).sum(dim=1), th.zeros(16))

    def test_mask_of_the_bonus(self):
        mask = random_mask()
        actions = mask.int().argmax(dim=1, keepdim=True)
        for name in VALUES:
            bonus = operators.gap_bonus(self.q_values, actions, 0.5, mask=mask, value=getattr(operators, name))
            assert_equal(bonus, self.q_values.gather(1, actions) - oracle(name, self.q_values, 0.5, mask))

    def test_constant_in_the_next_values_is_discounted(self):
        next_values = operators.soft_value(self.next_q_values, 0.5)
        shifted = operators.soft_value(self.next_q_values + 2.0, 0.5)
        before, after = (
            operators.bellman_target(self.rewards, self.dones, self.discount, values) for values in (next_values, shifted)
        )
        assert_equal(after - before, self.discount * 2.0 * (1 - self.dones))

    def test_discount_per_sample(self, run):
        """As n-step returns have them: gamma ** n of each sample."""
        steps = 1 + th.arange(16)[:, None] % 3
        discounts = 0.9 ** steps.double()
        next_values = operators.soft_value(self.next_q_values, 0.5)
        targets = run(operators.bellman_target)(self.rewards, self.dones, discounts, next_values)
        for i in range(16):
            next_part = 0.0 if self.dones[i] else 0.9 ** int(steps[i]) * next_values[i].item()
            assert targets[i].item() == pytest.approx(self.rewards[i].item() + next_part, abs=1e-12)

    def test_mirror_descent_step(self):
        """The value of the best policy, <pi, q> - kl_coef * KL(pi || previous) + ent_coef * H(pi), in closed form."""
        kl_coef, ent_coef = 0.6, 0.2
        previous = random_q_values(seed=7).log_softmax(dim=1)
        preferences = self.q_values + kl_coef * previous
        log_pi = operators.scaled_log_policy(preferences, kl_coef + ent_coef) / (kl_coef + ent_coef)
        pi = log_pi.exp()
        divergence = operators.kl_divergence(log_pi, previous)
        entropy = -(pi * log_pi).sum(dim=1, keepdim=True)
        value = (pi * self.q_values).sum(dim=1, keepdim=True) - kl_coef * divergence + ent_coef * entropy
        assert_equal(operators.soft_value(preferences, kl_coef + ent_coef), value)
        # And pi is proportional to previous ** (kl / (kl + ent)) * exp(q / (kl + ent))
        unnormalised = (0.75 * previous + self.q_values / 0.8).exp()
        assert_equal(pi, unnormalised / unnormalised.sum(dim=1, keepdim=True))


# --- divergence of policies ------------------------------------------------------------------------------------------


def test_kl_divergence_numbers(run):
    log_policy = th.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], dtype=th.float64).log()
    other = th.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]], dtype=th.float64).log()
    expected = [[0.5 * math.log(2) + 0.5 * math.log(2 / 3)], [0.0], [math.log(2)]]
    assert_equal(run(operators.kl_divergence)(log_policy, other), expected)
    # What `other` excludes, and the policy takes
    assert operators.kl_divergence(other[2:], log_policy[2:]).item() == math.inf
    # What both exclude
    assert operators.kl_divergence(log_policy[2:], log_policy[2:]).item() == 0


def test_kl_divergence_from_uniform_is_missing_entropy():
    q_values = random_q_values()
    log_policy = q_values.log_softmax(dim=1)
    uniform = th.full_like(q_values, -math.log(5))
    divergence = operators.kl_divergence(log_policy, uniform)
    assert_equal(divergence, math.log(5) - operators.entropy(q_values, 1.0))
    assert (divergence > 0).all()


def test_kl_divergence_of_masked_policies():
    mask = random_mask()
    log_policy, other = (operators.scaled_log_policy(random_q_values(seed=s), 1.0, mask) for s in (0, 1))
    divergence = operators.kl_divergence(log_policy, other, mask)
    assert_equal(operators.kl_divergence(log_policy, other), divergence)
    for i, valid in enumerate(mask):
        p, q = log_policy[i, valid], other[i, valid]
        assert divergence[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-12)


def test_entropy_of_the_uniform_policy():
    mask = random_mask()
    n_valid = mask.sum(dim=1, keepdim=True)
    assert_equal(operators.entropy(th.full((16, 5), 3.0, dtype=th.float64), 0.5, mask), n_valid.double().log())


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("name", ORACLES)
def test_wrong_shapes_of_values_are_refused(name, temperature):
    function, q_values = getattr(operators, name), random_q_values()
    with pytest.raises(AssertionError, match="q_values must be"):
        function(q_values[0], temperature)
    with pytest.raises(AssertionError, match="q_values must be"):
        function(q_values[None], temperature)
    with pytest.raises(AssertionError, match="mask"):
        function(q_values, temperature, random_mask()[:1])
    with pytest.raises(AssertionError, match="mask must be boolean"):
        function(q_values, temperature, random_mask().double())


def test_wrong_shapes_of_transitions_are_refused():
    q_values, column = random_q_values(), th.zeros(16, 1, dtype=th.float64)
    actions = th.zeros(16, 1, dtype=th.long)
    with pytest.raises(AssertionError, match="actions must be"):
        operators.gap_bonus(q_values, actions[:, 0], 0.5)
    with pytest.raises(AssertionError, match="one shape"):
        operators.double_soft_value(q_values, q_values[:1], 0.5)
    with pytest.raises(AssertionError, match="one shape"):
        operators.kl_divergence(q_values, q_values[:1])
    # Each of these would broadcast to a matrix of targets, or to targets of other samples
    for wrong in range(3):
        arguments = [column, column, column]
        for bad in (column[:, 0], q_values, column[:1]):
            if wrong == 2 and bad is q_values:
                continue  # quantiles of the next state
            arguments[wrong] = bad
            with pytest.raises(AssertionError, match="must be"):
                operators.bellman_target(arguments[0], arguments[1], 0.9, arguments[2])
    with pytest.raises(AssertionError, match="must be"):
        operators.bellman_target(q_values, q_values, 0.9, q_values)
