"""The temperature by itself: fixed, scheduled, learned."""

import math
import re
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq.temperature import DEFAULT_ENTROPY_FRACTION, Temperature, entropy_target, temperature_schedule

NAN, INF = math.nan, math.inf


def entropy_of(values, temperature):
    """Entropies of softmax(values / temperature)."""
    return th.distributions.Categorical(logits=values / temperature).entropy()


def learn(temperature, entropy, n_steps=1, learning_rate=0.01):
    for _ in range(n_steps):
        temperature.learn(temperature.excess_entropy(th.tensor([[entropy]])), learning_rate)
    return float(temperature.value)


# ---------------------------------------------------------------------- fixed and scheduled


@pytest.mark.parametrize("number", [0, 0.0, 0.03, 2, np.float32(0.5), np.int64(1)])
def test_number_stays(number):
    temperature = Temperature(number)
    assert not temperature.learned
    for progress in (1.0, 0.3, 0.0):
        temperature.update(progress)
        assert temperature.value == float(number) and type(temperature.value) is float


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("lin_0.1", {1.0: 0.1, 0.5: 0.05, 0.25: 0.025, 0.0: 0.0}),
        ("lin_2", {1.0: 2.0, 0.0: 0.0}),
        (lambda progress: 0.1 + progress**2, {1.0: 1.1, 0.5: 0.35, 0.0: 0.1}),
        (LinearSchedule(1.0, 0.2, 0.5), {1.0: 1.0, 0.75: 0.6, 0.5: 0.2, 0.0: 0.2}),
        (lambda progress: np.float32(progress), {1.0: 1.0, 0.5: 0.5}),
    ],
)
def test_schedule_is_followed(schedule, expected):
    temperature = Temperature(schedule)
    assert temperature.value == pytest.approx(expected[1.0]), "before the first update it has its initial value"
    for progress, value in expected.items():
        temperature.update(progress)
        assert temperature.value == pytest.approx(value) and type(temperature.value) is float
        assert temperature_schedule(schedule)(progress) == pytest.approx(value)


def test_fixed_temperature_has_nothing_to_save():
    temperature = Temperature(0.1)
    assert temperature.torch_names("temperature") == []
    assert not list(temperature.parameters()) and not temperature.state_dict()


@pytest.mark.parametrize("value", [NAN, INF, -0.1, "hot"])
def test_schedule_that_goes_wrong_is_named_where_it_does(value):
    temperature = Temperature(lambda progress: 1.0 if progress > 0.5 else value)
    temperature.update(0.75)
    with pytest.raises((ValueError, TypeError), match=re.compile("temperature.*remaining progress 0.25", re.DOTALL)):
        temperature.update(0.25)
    assert temperature.value == 1.0


# ---------------------------------------------------------------------- learned


@pytest.mark.parametrize(("temperature", "initial_value"), [("auto", 1.0), ("auto_0.1", 0.1), ("auto_3", 3.0)])
def test_learned_temperature_starts_at(temperature, initial_value):
    temperature = Temperature(temperature, n_actions=4)
    assert temperature.learned
    assert float(temperature.value) == pytest.approx(initial_value)
    assert temperature.value.shape == () and not temperature.value.requires_grad
    temperature.update(0.3)
    assert float(temperature.value) == pytest.approx(initial_value), "it has no schedule"


def test_learned_temperature_falls_above_the_target_and_grows_below():
    for entropy, sign in ((1.0, -1), (0.2, 1), (0.5, 0)):
        temperature = Temperature("auto_0.5", target_entropy=0.5, n_actions=4)
        change = learn(temperature, entropy) - 0.5
        assert np.sign(round(change, 6)) == sign


def test_gradient_is_the_difference_of_the_entropies():
    # d/d log_temperature of log_temperature * mean(H - H_target), checked against autograd and plain SGD
    entropies = th.tensor([[0.1], [0.7], [0.9]])
    temperature = Temperature("auto_0.5", target_entropy=0.3, n_actions=4)
    temperature.optimizer = th.optim.SGD([temperature.log_temperature], lr=1.0)
    log_temperature = temperature.log_temperature.detach().clone().requires_grad_()
    (log_temperature * (entropies - 0.3)).mean().backward()
    before = temperature.log_temperature.item()
    temperature.learn(temperature.excess_entropy(entropies), learning_rate=0.1)
    assert temperature.log_temperature.item() == pytest.approx(before - 0.1 * float(log_temperature.grad))


def test_learning_rate_is_taken_at_each_step():
    moves = []
    for learning_rate in (0.001, 0.01):
        temperature = Temperature("auto", n_actions=4, learning_rate=1.0)
        moves.append(math.log(learn(temperature, entropy=0.0, learning_rate=learning_rate)))
    assert moves == pytest.approx([0.001, 0.01], rel=1e-4)  # Adam's first step is the learning rate


@pytest.mark.parametrize("initial", ["auto_0.01", "auto_10"])
@pytest.mark.parametrize("fraction", [0.1, DEFAULT_ENTROPY_FRACTION, 0.9])
@pytest.mark.parametrize("n_actions", [2, 3, 18])
def test_entropy_reaches_its_target(initial, fraction, n_actions):
    # A policy whose action values do not change: the fixed point is the temperature at which its entropy is the target
    values = th.linspace(0.0, 1.0, n_actions).view(1, -1)
    temperature = Temperature(initial, f"auto_{fraction}", n_actions)
    for step in range(800):
        temperature.learn(
            temperature.excess_entropy(entropy_of(values, temperature.value)), learning_rate=0.1 if step < 400 else 0.01
        )
    assert float(entropy_of(values, temperature.value)) == pytest.approx(fraction * math.log(n_actions), rel=0.01)


def test_state_holds_temperature_and_optimizer():
    first, second = Temperature("auto_0.1", n_actions=3), Temperature("auto_0.1", n_actions=3)
    learn(first, entropy=0.1, n_steps=5)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(deepcopy(first.optimizer.state_dict()))
    assert first.torch_names("t") == ["t", "t.optimizer"]
    assert float(second.value) == float(first.value) != pytest.approx(0.1, rel=0.01)
    # Adam's moments too: both go the same way from here
    assert learn(first, entropy=1.0, n_steps=3) == learn(second, entropy=1.0, n_steps=3)
    fresh = Temperature("auto_0.1", n_actions=3)
    fresh.load_state_dict(first.state_dict())
    assert learn(first, entropy=1.0) != learn(fresh, entropy=1.0)


def test_learning_needs_no_gradient_of_the_entropies():
    values = th.tensor([[0.0, 1.0]], requires_grad=True)
    temperature = Temperature("auto", n_actions=2)
    temperature.learn(temperature.excess_entropy(entropy_of(values, 1.0)), 0.01)
    assert values.grad is None


@pytest.mark.parametrize("temperature", [0.5, "lin_0.1", "auto"])
def test_repr_says_what_it_is(temperature):
    assert repr(Temperature(temperature)).startswith("Temperature(")


# ---------------------------------------------------------------------- the target


@pytest.mark.parametrize(
    ("target_entropy", "n_actions", "nats"),
    [
        ("auto", 2, DEFAULT_ENTROPY_FRACTION * math.log(2)),
        ("auto", 18, DEFAULT_ENTROPY_FRACTION * math.log(18)),
        ("auto_0.3", 4, 0.3 * math.log(4)),
        ("auto_1", 4, math.log(4)),
        ("auto_0", 4, 0.0),
        (0.2, 2, 0.2),
        (0, 2, 0.0),
        (math.log(3), 3, math.log(3)),
        ("auto", 1, 0.0),
    ],
)
def test_entropy_target(target_entropy, n_actions, nats):
    assert entropy_target(target_entropy, n_actions) == pytest.approx(nats)


def test_default_target_can_be_kept_with_two_actions():
    # Where action values differ by d, the entropy is the target at the temperature d / log(p / (1 - p)): a moderate one
    values = th.tensor([[0.0, 1.0]])
    assert float(entropy_of(values, 1.0)) > entropy_target("auto", 2) > float(entropy_of(values, 0.25))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (NAN, ValueError, "temperature must be finite, not nan"),
        (INF, ValueError, "temperature must be finite, not inf"),
        (-0.1, ValueError, "temperature must be at least 0, not -0.1"),
        (True, TypeError, "temperature must be a number, not True of type bool"),
        (None, TypeError, "temperature must be a number, not None"),
        ([0.1], TypeError, r"temperature must be a number, not \[0.1\]"),
        ("0.1", ValueError, "temperature must be a number, a callable or a schedule like 'lin_0.1', not '0.1'"),
        ("foo", ValueError, "'foo'"),
        ("", ValueError, "temperature must be"),
        ("lin_x", ValueError, "temperature must be written like 'lin_0.1', not 'lin_x'"),
        ("lin_", ValueError, "'lin_'"),
        ("lin_0", ValueError, "temperature must be positive, not 0"),
        ("lin_-1", ValueError, "temperature must be positive, not -1"),
        ("lin_nan", ValueError, "temperature must be finite, not nan"),
        ("auto_x", ValueError, "temperature must be written like 'auto_0.1', not 'auto_x'"),
        ("automatic", ValueError, "'automatic'"),
        ("auto_0", ValueError, "temperature must be positive, not 0"),
        ("auto_-1", ValueError, "temperature must be positive, not -1"),
        ("auto_inf", ValueError, "temperature must be finite, not inf"),
        (lambda progress: -progress, ValueError, "temperature.*must be at least 0, not -1"),
        (lambda progress: "hot", TypeError, "temperature.*must be a number, not 'hot'"),
    ],
)
def test_bad_temperature(temperature, error, message):
    with pytest.raises(error, match=message):
        Temperature(temperature)


def test_where_it_cannot_be_learned():
    with pytest.raises(ValueError, match=r"temperature='auto_0.1' cannot be learned .* pass a number"):
        Temperature("auto_0.1", learnable=False)
    assert Temperature(0.1, learnable=False).value == 0.1


@pytest.mark.parametrize(
    ("target_entropy", "error", "message"),
    [
        (0.7, ValueError, r"target_entropy must be at most log\(2\) = 0.6931 nats.*not 0.7"),
        (-0.1, ValueError, "target_entropy must be at least 0, not -0.1"),
        (NAN, ValueError, "target_entropy must be finite, not nan"),
        (True, TypeError, "target_entropy must be a number, not True"),
        (None, TypeError, "target_entropy must be a number, not None"),
        ("foo", ValueError, "target_entropy must be a number, 'auto' or like 'auto_0.3', not 'foo'"),
        ("auto_x", ValueError, "target_entropy must be written like 'auto_0.3', not 'auto_x'"),
        ("auto_1.1", ValueError, "target_entropy must be between 0 and 1, not 1.1"),
        ("auto_nan", ValueError, "target_entropy must be finite, not nan"),
    ],
)
def test_bad_target_entropy(target_entropy, error, message):
    with pytest.raises(error, match=message):
        Temperature("auto", target_entropy, n_actions=2)
