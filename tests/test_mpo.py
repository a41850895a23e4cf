"""MPO and RERPI: the identities of their mathematics, and that the agents compute it."""

import math

import numpy as np
import pytest
import torch as th
from continuous import BoxEnv, box_actions, fill_scaled, make_filled
from helpers import VECTOR, RandomEnv, assert_same, is_same, make_model, snapshot
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from sb3_softq import MPO, RERPI, DivergenceError, losses
from sb3_softq.actor_critic import policies
from sb3_softq.actor_critic.mpo import Multipliers, PolicyEvaluation

BATCH, SAMPLES, DIM = 5, 7, 3


@pytest.fixture(autouse=True)
def random_numbers():
    th.manual_seed(0)


def normal(*shape):
    return th.randn(*shape, dtype=th.float64)


def make_scale(full):
    """Standard deviations, or Cholesky factors."""
    stds = 0.3 + th.rand(BATCH, DIM, dtype=th.float64)
    return th.diag_embed(stds) + normal(BATCH, DIM, DIM).tril(-1) if full else stds


def torch_gaussian(mean, scale):
    return MultivariateNormal(mean, scale_tril=scale if scale.ndim == 3 else th.diag_embed(scale))


# ---------------------------------------------------------------------- Gaussians


@pytest.mark.parametrize("full", [False, True])
def test_gaussian_log_prob(full):
    mean, scale, actions = normal(BATCH, DIM), make_scale(full), normal(BATCH, SAMPLES, DIM)
    expected = th.stack([torch_gaussian(mean, scale).log_prob(actions[:, i]) for i in range(SAMPLES)], dim=1)
    th.testing.assert_close(losses.gaussian_log_prob(actions, mean, scale), expected)


@pytest.mark.parametrize("full", [False, True])
def test_gaussian_kl_divergences(full):
    old_mean, mean, old_scale, scale = normal(BATCH, DIM), normal(BATCH, DIM), make_scale(full), make_scale(full)
    old = torch_gaussian(old_mean, old_scale)
    kl_mean, kl_covariance = (
        losses.gaussian_mean_kl(old_mean, old_scale, mean),
        losses.gaussian_covariance_kl(old_scale, scale),
    )
    assert kl_mean.shape == kl_covariance.shape == (BATCH, 1 if full else DIM)
    th.testing.assert_close(kl_mean.sum(dim=1), kl_divergence(old, torch_gaussian(mean, old_scale)))
    # From the old policy to the new one, not the reverse, which has another value
    th.testing.assert_close(kl_covariance.sum(dim=1), kl_divergence(old, torch_gaussian(old_mean, scale)))
    reverse = kl_divergence(torch_gaussian(old_mean, scale), old)
    assert (kl_covariance.sum(dim=1) - reverse).abs().max() > 0.1


def test_a_diagonal_covariance_is_a_full_one():
    old_scale, scale, mean = make_scale(False), make_scale(False), normal(BATCH, DIM)
    for one, other in [
        (
            losses.gaussian_covariance_kl(old_scale, scale),
            losses.gaussian_covariance_kl(*map(th.diag_embed, (old_scale, scale))),
        ),
        (losses.gaussian_mean_kl(mean, scale, -mean), losses.gaussian_mean_kl(mean, th.diag_embed(scale), -mean)),
    ]:
        th.testing.assert_close(one.sum(dim=1, keepdim=True), other)


@pytest.mark.parametrize("full", [False, True])
def test_gaussian_samples_have_their_moments(full):
    mean, scale = normal(BATCH, DIM), make_scale(full)
    samples = losses.gaussian_sample(mean, scale, 200_000)
    th.testing.assert_close(samples.mean(dim=1), mean, atol=0.02, rtol=0)
    for one, expected in zip(samples, torch_gaussian(mean, scale).covariance_matrix, strict=True):
        th.testing.assert_close(one.T.cov(), expected, atol=0.05, rtol=0.02)


# ---------------------------------------------------------------------- E-step


def kl_from_uniform(weights):
    return (weights * (weights * weights.shape[1]).log()).sum(dim=1)


def test_derivative_of_the_dual_is_epsilon_less_the_kl_of_the_weights():
    q_values = normal(BATCH, SAMPLES)
    temperature = th.tensor([0.7], dtype=th.float64, requires_grad=True)
    losses.temperature_dual(q_values, temperature, 0.1).backward()
    kl = kl_from_uniform(losses.exponential_weights(q_values, 0.7)).mean()
    assert float(temperature.grad) == pytest.approx(0.1 - float(kl), abs=1e-12)


def test_derivative_of_the_categorical_dual():
    q_values, log_policy = normal(BATCH, SAMPLES), normal(BATCH, SAMPLES).log_softmax(dim=1)
    temperature = th.tensor([0.7], dtype=th.float64, requires_grad=True)
    losses.temperature_dual(q_values, temperature, 0.1, log_policy).backward()
    weights = losses.categorical_weights(q_values, log_policy, 0.7)
    kl = (weights * (weights.log() - log_policy)).sum(dim=1).mean()
    assert float(temperature.grad) == pytest.approx(0.1 - float(kl), abs=1e-12)


def test_at_the_minimum_of_the_dual_the_kl_is_epsilon():
    q_values = 100 * normal(BATCH, SAMPLES)
    log_temperature = th.zeros(1, dtype=th.float64, requires_grad=True)
    optimizer = th.optim.LBFGS([log_temperature], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = losses.temperature_dual(q_values, log_temperature.exp(), 0.3)
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = losses.exponential_weights(q_values, log_temperature.detach().exp())
    assert float(kl_from_uniform(weights).mean()) == pytest.approx(0.3, abs=1e-6)


def test_weights_do_not_change_with_a_constant_or_with_the_unit():
    q_values, log_policy = normal(BATCH, SAMPLES), normal(BATCH, SAMPLES).log_softmax(dim=1)
    for weigh in (losses.exponential_weights, lambda q, t: losses.categorical_weights(q, log_policy, t)):
        weights = weigh(q_values, 0.5)
        th.testing.assert_close(weights.sum(dim=1), th.ones(BATCH, dtype=th.float64))
        th.testing.assert_close(weigh(q_values + 100, 0.5), weights)
        th.testing.assert_close(weigh(1000 * q_values, 500), weights)


def test_limits_of_the_temperature():
    q_values, log_policy = normal(BATCH, SAMPLES), normal(BATCH, SAMPLES).log_softmax(dim=1)
    th.testing.assert_close(losses.exponential_weights(q_values, 1e9), th.full_like(q_values, 1 / SAMPLES))
    th.testing.assert_close(losses.categorical_weights(q_values, log_policy, 1e9), log_policy.exp())
    best = th.nn.functional.one_hot(q_values.argmax(dim=1), SAMPLES).double()
    th.testing.assert_close(losses.exponential_weights(q_values, 1e-9), best)
    th.testing.assert_close(losses.categorical_weights(q_values, log_policy, 1e-9), best)


def test_equal_values_give_equal_weights_and_the_dual_its_constant():
    q_values = th.full((BATCH, SAMPLES), 3.0, dtype=th.float64)
    th.testing.assert_close(losses.exponential_weights(q_values, 0.5), th.full_like(q_values, 1 / SAMPLES))
    dual = losses.temperature_dual(q_values, th.tensor([0.5], dtype=th.float64), 0.1)
    assert float(dual) == pytest.approx(0.5 * 0.1 + 3.0)


def test_enumerated_actions_with_a_uniform_policy_are_samples():
    q_values, temperature = normal(BATCH, SAMPLES), th.tensor([0.5], dtype=th.float64)
    uniform = th.full_like(q_values, -math.log(SAMPLES))
    weights = losses.categorical_weights(q_values, uniform, temperature)
    th.testing.assert_close(weights, losses.exponential_weights(q_values, temperature))
    duals = [losses.temperature_dual(q_values, temperature, 0.1, log_policy) for log_policy in (None, uniform)]
    th.testing.assert_close(*duals)


TRANSFORMS = [lambda q: 1e4 * q - 7, lambda q: q**3, th.exp, th.tanh, lambda q: -1 / (q.exp() + 1)]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rank_weights_do_not_change_with_an_increasing_transform(transform):
    q_values = normal(BATCH, SAMPLES)
    weights = losses.rank_weights(q_values)
    assert th.equal(losses.rank_weights(transform(q_values)), weights)
    assert not th.equal(losses.rank_weights(-q_values), weights)


def test_rank_weights_are_those_of_cma_es():
    weights = losses.rank_weights(th.arange(20.0, dtype=th.float64).flip(0).unsqueeze(0))[0]
    expected = np.log(20.5 / np.arange(1, 21))
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=1e-12)
    assert float(weights[0]) == pytest.approx(0.167, abs=1e-3) and float(weights.min()) > 0


def test_identity_weights_are_a_policy_gradient():
    # In expectation over many samples: the gradient of the expected value of Q(a) = -|a - 1|^2 for a Gaussian
    mean = th.zeros(1, 2, dtype=th.float64, requires_grad=True)
    scale = th.full((1, 2), 0.5, dtype=th.float64)
    actions = losses.gaussian_sample(mean.detach(), scale, 400_000)
    weights = losses.identity_weights(-(actions - 1).square().sum(dim=2))
    (weights * losses.gaussian_log_prob(actions, mean, scale)).sum().backward()
    th.testing.assert_close(mean.grad, th.full_like(mean, 2.0), atol=0.03, rtol=0)
    assert float(weights.sum().abs()) < 1e-9


# ---------------------------------------------------------------------- M-step


@pytest.mark.parametrize("full", [False, True])
def test_at_the_old_policy_the_decoupled_gradients_are_the_joint_one(full):
    mean, scale, actions = normal(BATCH, DIM), make_scale(full), normal(BATCH, SAMPLES, DIM)
    weights = normal(BATCH, SAMPLES).softmax(dim=1)
    new = [tensor.clone().requires_grad_() for tensor in (mean, scale)]
    losses.decoupled_cross_entropy(weights, actions, (mean, scale), tuple(new)).backward()
    joint = [tensor.clone().requires_grad_() for tensor in (mean, scale)]
    (-(weights * losses.gaussian_log_prob(actions, *joint)).sum(dim=1).mean()).backward()
    for one, other in zip(new, joint, strict=True):
        th.testing.assert_close(one.grad, other.grad)
    # and both divergences, and their gradients, are 0
    for tensor in new:
        tensor.grad = None
    kls = losses.gaussian_mean_kl(mean, scale, new[0]).sum() + losses.gaussian_covariance_kl(scale, new[1]).sum()
    kls.backward()
    assert float(kls.detach()) == pytest.approx(0, abs=1e-12)
    for tensor in new:
        gradient = tensor.grad.tril() if tensor.ndim == 3 else tensor.grad
        assert float(gradient.abs().max()) < 1e-9


def test_mean_and_covariance_learn_apart():
    mean, scale, actions = normal(BATCH, DIM), make_scale(False), normal(BATCH, SAMPLES, DIM)
    weights = normal(BATCH, SAMPLES).softmax(dim=1)
    gradients = []
    for shift in (0.0, 1.0):  # of the other half of the new policy
        new_mean, new_scale = mean.clone().requires_grad_(), (scale + shift).requires_grad_()
        losses.decoupled_cross_entropy(weights, actions, (mean, scale), (new_mean, new_scale)).backward()
        gradients.append(new_mean.grad)
    th.testing.assert_close(*gradients)


def test_with_uniform_weights_the_old_policy_is_stationary_in_expectation():
    mean, scale = normal(1, DIM), make_scale(False)[:1]
    actions = losses.gaussian_sample(mean, scale, 400_000)
    new = [tensor.clone().requires_grad_() for tensor in (mean, scale)]
    losses.decoupled_cross_entropy(th.full((1, 400_000), 1 / 400_000).double(), actions, (mean, scale), tuple(new)).backward()
    for tensor in new:
        th.testing.assert_close(tensor.grad, th.zeros_like(tensor), atol=0.02, rtol=0)


def test_kl_penalty():
    kl = th.tensor([0.3, 0.1], dtype=th.float64, requires_grad=True)
    alpha = th.tensor([2.0, 5.0], dtype=th.float64, requires_grad=True)
    penalty, dual = losses.kl_penalty(kl, alpha, 0.2)
    gradients = th.autograd.grad(penalty + dual, (kl, alpha))
    th.testing.assert_close(gradients[0], th.tensor([2.0, 5.0], dtype=th.float64))
    # The multiplier's is epsilon less the KL: it grows, by descent, while the KL is too large
    th.testing.assert_close(gradients[1], th.tensor([-0.1, 0.1], dtype=th.float64))


def test_out_of_range_cost():
    actions = th.tensor([[[0.5, -1.0], [4.0, -5.0]]])
    th.testing.assert_close(losses.out_of_range_cost(actions), th.tensor([[0.0, -5.0]]))


# ---------------------------------------------------------------------- Retrace


def slow_retrace(rewards, discounts, q_values, next_values, log_ratios, valid):
    """By the sum in the paper, one sequence and one step at a time."""
    results = []
    for i in range(len(rewards)):
        result, factor = float(q_values[i, 0]), 1.0
        for t in range(rewards.shape[1]):
            if t > 0:
                factor *= float(discounts[i, t - 1]) * min(1.0, math.exp(float(log_ratios[i, t - 1])))
            if not valid[i, t]:
                break
            result += factor * float(rewards[i, t] + discounts[i, t] * next_values[i, t] - q_values[i, t])
        results.append([result])
    return th.tensor(results, dtype=th.float64)


def sequences(n_steps=4, batch_size=50):
    tensors = [normal(batch_size, n_steps) for _ in range(4)]
    lengths = th.randint(1, n_steps + 1, (batch_size, 1))
    valid = (th.arange(n_steps) < lengths).double()
    discounts = th.full_like(valid, 0.9)
    discounts[::3, n_steps // 2] = 0.0
    return tensors[0], discounts, tensors[1], tensors[2], tensors[3][:, 1:], valid


def test_retrace_against_a_plain_loop():
    arguments = sequences()
    th.testing.assert_close(losses.retrace(*arguments), slow_retrace(*arguments))


def test_retrace_of_one_step_is_td():
    rewards, discounts, q_values, next_values, log_ratios, valid = sequences(n_steps=1)
    expected = rewards + discounts * next_values
    th.testing.assert_close(losses.retrace(rewards, discounts, q_values, next_values, log_ratios, valid), expected)


def test_retrace_on_policy_telescopes_to_the_n_step_return():
    # Ratios of at least 1, and values of the next states that are those of the next actions
    rewards, _, q_values, next_values, log_ratios, _ = sequences()
    next_values = th.cat([q_values[:, 1:], next_values[:, -1:]], dim=1)
    discounts, valid = th.full_like(rewards, 0.9), th.ones_like(rewards)
    factors = 0.9 ** th.arange(4, dtype=th.float64)
    expected = (factors * rewards).sum(dim=1, keepdim=True) + 0.9**4 * next_values[:, -1:]
    result = losses.retrace(rewards, discounts, q_values, next_values, log_ratios.abs(), valid)
    th.testing.assert_close(result, expected)


# ---------------------------------------------------------------------- agents

AGENTS = {
    "MPO": (MPO, {}),
    "MPO per dimension": (MPO, dict(per_dimension_kl=True)),
    "MPO full covariance": (MPO, dict(policy_kwargs=dict(net_arch=[16], full_covariance=True))),
    "MPO without penalty": (MPO, dict(action_penalty=False)),
    "MPO n-step": (MPO, dict(n_steps=3)),
    "MPO Retrace": (MPO, dict(n_steps=3, retrace=True)),
    "MPO one critic": (MPO, dict(policy_kwargs=dict(net_arch=[16], n_critics=1))),
    "RERPI rank": (RERPI, dict(weighting="rank")),
    "RERPI exponential": (RERPI, dict(weighting="exponential")),
    "RERPI identity": (RERPI, dict(weighting="identity")),
}
SAME = ("MPO Retrace", "MPO one critic")  # on a bandit
CASES = [(algorithm, BoxEnv, options) for algorithm, options in AGENTS.values()]
CASES += [(MPO, RandomEnv, options) for options in ({}, dict(n_steps=3), dict(n_steps=3, retrace=True))]
IDS = [*AGENTS, "Discrete", "Discrete n-step", "Discrete Retrace"]


@pytest.mark.parametrize(("algorithm", "env", "options"), CASES, ids=IDS)
def test_everything_learns(algorithm, env, options):
    model = make_model(algorithm, env(VECTOR), target_update_interval=5, **options)
    before = snapshot(model)
    model.learn(60)
    after = snapshot(model)
    for name in ("policy", "multipliers"):
        assert not any(th.equal(before[name][key], after[name][key]) for key in before[name]), name
        assert all(bool(th.isfinite(value).all()) for value in after[name].values())


def train_on_bandit(algorithm, best, n_updates=800, env=None, **options):
    """Rewards that depend on the action alone, of episodes of one step."""
    env = BoxEnv(action_space=box_actions(2)) if env is None else env
    kwargs = dict(learning_rate=1e-2, target_update_interval=10, policy_kwargs=dict(net_arch=[32]), buffer_size=2000)
    model = make_model(algorithm, env, **{**kwargs, **options})
    fill_scaled(model, 1000)
    buffer = model.replay_buffer
    buffer.dones[:], buffer.timeouts[:] = 1, 0
    buffer.rewards[: buffer.pos, 0] = best(buffer.actions[: buffer.pos, 0])
    model.train(n_updates, batch_size=64)
    return model


@pytest.mark.parametrize(
    ("algorithm", "options"), [pair for name, pair in AGENTS.items() if "step" not in name and name not in SAME]
)
def test_finds_the_best_action(algorithm, options):
    policy_kwargs = {**options.get("policy_kwargs", {}), "net_arch": [32]}
    target = np.array([0.6, -0.4])
    model = train_on_bandit(
        algorithm, lambda actions: -2 * np.square(actions - target).sum(axis=1), **{**options, "policy_kwargs": policy_kwargs}
    )
    actions, _ = model.predict(np.stack([VECTOR.sample() for _ in range(20)]), deterministic=True)
    np.testing.assert_allclose(actions, np.tile(target, (20, 1)), atol=0.2)


def test_finds_the_best_discrete_action():
    env = RandomEnv(VECTOR, n_actions=4)
    model = train_on_bandit(MPO, lambda actions: 10.0 * (actions[:, 0] == 2), env=env)
    actions, _ = model.predict(np.stack([VECTOR.sample() for _ in range(20)]), deterministic=True)
    assert (actions == 2).all()


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_rank_weights_make_the_actors_update_the_same_at_any_scale_of_the_values(scale):
    models = [make_filled(RERPI, action_penalty=False) for _ in range(2)]
    with th.no_grad():
        for q_network in models[1].policy.critic_target.q_networks:
            q_network[-1].weight *= scale
            q_network[-1].bias *= scale
    for model in models:
        set_random_seed(3)
        model.train(1, batch_size=16)
    assert_same(models[0].policy.actor.state_dict(), models[1].policy.actor.state_dict())


@pytest.mark.parametrize("options", [{}, dict(tau=0.25)])
def test_targets_are_copied_at_their_interval(options):
    model = make_filled(MPO, target_update_interval=3, **options)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.train(2, batch_size=16)
    for name in ("actor_target", "critic_target"):
        old = {key.removeprefix(f"{name}."): value for key, value in before.items() if key.startswith(name)}
        assert_same(getattr(model.policy, name).state_dict(), old)
    model.train(1, batch_size=16)
    tau = options.get("tau", 1.0)
    for online, name in ((model.policy.actor, "actor_target"), (model.policy.critic, "critic_target")):
        for key, value in getattr(model.policy, name).state_dict().items():
            expected = tau * online.state_dict()[key] + (1 - tau) * before[f"{name}.{key}"]
            th.testing.assert_close(value, expected)
    assert model._n_updates == 3


def test_targets_by_hand():
    model = make_filled(MPO, n_action_samples=50_000)
    replay_data = model.replay_buffer.sample(8)
    with th.no_grad():
        targets = model._compute_targets(replay_data, model._evaluate(replay_data.next_observations))
        mean, scale = model.policy.actor_target(replay_data.next_observations)
        values = []
        for i in range(8):
            actions = Normal(mean[i], scale[i]).sample((50_000,)).clamp(-1, 1)
            observations = replay_data.next_observations[i].expand(50_000, -1)
            values.append(th.min(*model.policy.critic_target(observations, actions)).mean())
    expected = replay_data.rewards + 0.99 * (1 - replay_data.dones) * th.stack(values).unsqueeze(1)
    th.testing.assert_close(targets, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("cache_size", [1, 300, 10**9])
def test_values_of_sampled_actions_are_the_critics(cache_size, monkeypatch):
    """In pieces of one state, of a few with a remainder, and in one."""
    monkeypatch.setattr(policies, "CACHE_SIZE", cache_size)
    critic = make_filled(MPO).policy.critic
    observations, actions = th.rand(BATCH, *VECTOR.shape), th.rand(BATCH, SAMPLES, 2)
    with th.no_grad():
        q_values = policies.sampled_q_values(critic, observations, actions)
        expected = [th.cat(critic(observations, actions[:, i]), dim=1).T for i in range(SAMPLES)]
    th.testing.assert_close(q_values, th.stack(expected, dim=2))


def test_discrete_targets_are_exact_expectations():
    model = make_filled(MPO, RandomEnv(VECTOR))
    replay_data = model.replay_buffer.sample(8)
    with th.no_grad():
        targets = model._compute_targets(replay_data, model._evaluate(replay_data.next_observations))
        q_values = th.min(*model.policy.critic_target(replay_data.next_observations))
        probs = th.softmax(
            model.policy.actor_target.logits(model.policy.actor_target.latent(replay_data.next_observations)), 1
        )
    expected = replay_data.rewards + 0.99 * (1 - replay_data.dones) * (probs * q_values).sum(dim=1, keepdim=True)
    th.testing.assert_close(targets, expected)


@pytest.mark.parametrize("env", [BoxEnv(), RandomEnv(VECTOR)], ids=["Box", "Discrete"])
def test_log_probabilities_are_those_of_the_behaviour(env):
    # Nothing is learned, so the policy that acted is the one there is
    model = make_model(MPO, env, retrace=True, n_steps=2, gradient_steps=0, learning_starts=10)
    model.learn(40)
    buffer = model.replay_buffer
    observations = th.as_tensor(buffer.observations[:40, 0])
    drawn = th.as_tensor(buffer.extras["drawn_actions"][:40, 0])
    with th.no_grad():
        policy = model.policy.actor(observations)
        if isinstance(env, BoxEnv):
            expected = losses.gaussian_log_prob(drawn.unsqueeze(1), *policy)[:, 0]
            warm_up = -2 * math.log(2)
            np.testing.assert_allclose(buffer.actions[:40, 0], drawn.clamp(-1, 1), atol=1e-6)
            assert (drawn.abs() > 1).any()
        else:
            expected = policy.gather(1, drawn.long().unsqueeze(1))[:, 0]
            warm_up = -math.log(3)
    np.testing.assert_allclose(buffer.extras["log_probs"][:10, 0], warm_up, rtol=1e-6)
    np.testing.assert_allclose(buffer.extras["log_probs"][10:40, 0], expected[10:], rtol=1e-4, atol=1e-5)


def test_retrace_targets_by_the_plain_loop():
    # From the transitions in the order in which they were stored: episodes of ten steps, every second one cut
    env = DummyVecEnv([lambda: BoxEnv(truncate=True)])
    model = make_model(MPO, env, retrace=True, n_steps=4, gradient_steps=0, n_action_samples=2)
    model.learn(60)
    with th.no_grad():
        model.policy.actor_target.mean.bias += 0.5  # so that it is not the policy that acted
    buffer = model.replay_buffer
    buffer.timeouts[9::20] = 0
    rows = np.arange(60)
    data = buffer._get_samples(rows)
    observations, next_observations = th.as_tensor(buffer.observations[:60, 0]), th.as_tensor(buffer.next_observations[:60, 0])

    def evaluate(states):
        """Without randomness, the value that stands for the mean over sampled actions."""
        policy = model.policy.actor_target(states)
        values = th.min(*model.policy.critic_target(states, policy[0].clamp(-1, 1)))
        return PolicyEvaluation(policy, None, values, values)

    model._evaluate = evaluate
    with th.no_grad():
        targets = model._compute_targets(data, evaluate(data.next_observations))
        q_values = th.min(*model.policy.critic_target(observations, th.as_tensor(buffer.actions[:60, 0])))[:, 0]
        mean, scale = model.policy.actor_target(observations)
        drawn = th.as_tensor(buffer.extras["drawn_actions"][:60, 0])
        log_ratios = Normal(mean, scale).log_prob(drawn).sum(dim=1) - th.as_tensor(buffer.extras["log_probs"][:60, 0])
        next_values = evaluate(next_observations).values[:, 0]
    for i in range(60):
        # Up to the end of the episode, or of what is stored
        length = min(4, 10 - i % 10)
        segment = slice(i, i + length)
        terminated = [float(row % 10 == 9 and row % 20 == 9) for row in range(i, i + length)]
        discounts = 0.99 * (1 - th.tensor(terminated))
        rewards = th.as_tensor(buffer.rewards[segment, 0])
        arguments = [rewards, discounts, q_values[segment], next_values[segment], log_ratios[segment][1:], th.ones(length)]
        expected = slow_retrace(*[argument.unsqueeze(0) for argument in arguments])
        assert float(targets[i]) == pytest.approx(float(expected), abs=1e-4), i


def test_an_untrained_policy_has_its_standard_deviation():
    for full in (False, True):
        policy_kwargs = dict(net_arch=[16], initial_std=0.7, full_covariance=full)
        model = make_model(MPO, BoxEnv(), policy_kwargs=policy_kwargs)
        with th.no_grad():
            mean, scale = model.policy.actor(th.zeros(1, 4))
        assert losses.is_full(mean, scale) == full
        stds = scale.diagonal(dim1=1, dim2=2) if full else scale
        th.testing.assert_close(stds, th.full_like(stds, 0.7), atol=0.35, rtol=0)


def test_a_multiplier_grows_while_its_constraint_is_broken():
    model = make_filled(MPO, learning_rate=0.1, epsilon_mean=1e-6, epsilon_covariance=100.0)
    before = {name: float(model.multipliers[name].detach()) for name in ("alpha_mean", "alpha_covariance")}
    model.train(5, batch_size=16)
    assert float(model.multipliers["alpha_mean"].detach()) > before["alpha_mean"]
    assert float(model.multipliers["alpha_covariance"].detach()) < before["alpha_covariance"]


def test_multipliers_start_where_they_should():
    initial = {"temperature": (1e6, 1), "alpha_mean": (1e-3, 2), "alpha_covariance": (1000.0, 1)}
    multipliers = Multipliers(initial, 0.01)
    for name, (value, size) in initial.items():
        th.testing.assert_close(multipliers[name], th.full((size,), value), rtol=1e-4, atol=0)


def test_a_constraint_that_cannot_hold_does_not_drown_the_rest():
    """Adam's noise alone can move a policy by more than its bound: its multiplier rises by steps, a temperature by factors."""
    multipliers = Multipliers({"temperature": (1.0, 1), "alpha_mean": (1.0, 1)}, 0.01)
    for _ in range(1000):
        multipliers.optimizer.zero_grad()
        (-multipliers["temperature"] - multipliers["alpha_mean"]).sum().backward()
        multipliers.optimizer.step()
        multipliers.clamp()
    assert float(multipliers["alpha_mean"].detach()) == pytest.approx(11, rel=0.05)
    assert float(multipliers["temperature"].detach()) > math.exp(10)


def test_an_update_that_breaks_off_changes_nothing():
    model = make_filled(MPO)
    model.train(2, batch_size=16)
    model.replay_buffer.rewards[:] = math.nan
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    multipliers = {name: value.clone() for name, value in model.multipliers.state_dict().items()}
    with pytest.raises(DivergenceError, match="rewards of update 3"):
        model.train(1, batch_size=16)
    assert is_same(before, model.policy.state_dict()) and is_same(multipliers, model.multipliers.state_dict())
