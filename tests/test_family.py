"""Identities and fixed points of the rest of the discrete family: DPP, CVI, MoDQN, MD-DQN, MIQN, SACDiscrete."""

import math

import numpy as np
import pytest
import torch as th
from helpers import assert_same
from stable_baselines3 import DQN
from test_fixed_points import MDPS, N_STATES, MDPEnv, WholeBuffer, assert_solved, fill, gaps, make_linear
from test_identities import ROUNDING, copy_networks, make, sample, targets

from sb3_softq import (
    CVI,
    DPP,
    SQN,
    MirrorDescentDQN,
    MomentumDQN,
    MunchausenDQN,
    MunchausenIQN,
    SACDiscrete,
    SoftDQN,
    operators,
)
from sb3_softq.tabular import mirror_descent, value_iteration

T = 0.3


def twin(source, algorithm, **kwargs):
    """A model of another class with the same networks and transitions."""
    model = make(algorithm, exploration="eps_greedy", **kwargs)
    copy_networks(source, model)
    return model


# ---------------------------------------------------------------------- identities, in float64


@pytest.mark.usefixtures("float64")
class TestIdentities:
    def test_cvi_without_gap_is_soft_dqn_less_the_entropy_of_the_uniform_policy(self):
        soft = make(SoftDQN, temperature=T)
        cvi = twin(soft, CVI, temperature=T, munchausen_alpha=0.0)
        replay_data = sample(soft)
        shift = GAMMA_OF_IDENTITIES * T * math.log(3) * (1 - replay_data.dones.double())
        assert_same(targets(cvi, replay_data), targets(soft, replay_data) - shift, **ROUNDING)

    def test_cvi_at_temperature_0_is_advantage_learning(self):
        cvi = make(CVI, temperature=0.0, munchausen_alpha=0.7)
        replay_data = sample(cvi)
        with th.no_grad():
            q_values = cvi.q_net_target(replay_data.observations)
            next_values = cvi.q_net_target(replay_data.next_observations).amax(dim=1, keepdim=True)
        gap = q_values.gather(1, replay_data.actions) - q_values.amax(dim=1, keepdim=True)
        expected = replay_data.rewards + 0.7 * gap + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(cvi, replay_data), expected, **ROUNDING)
        munchausen = twin(cvi, MunchausenDQN, temperature=0.0, munchausen_alpha=0.7, munchausen_clip=-math.inf)
        assert_same(targets(munchausen, replay_data), expected, **ROUNDING)

    def test_dpp_l_is_munchausen_of_full_weight(self):
        dpp = make(DPP, temperature=T, operator="logsumexp", gap_clip=-0.5)
        munchausen = twin(dpp, MunchausenDQN, temperature=T, munchausen_alpha=1.0, munchausen_clip=-0.5)
        assert_same(targets(dpp, sample(dpp)), targets(munchausen, sample(dpp)), **ROUNDING)

    def test_dpp_with_the_boltzmann_average_is_its_recursion(self):
        dpp = make(DPP, temperature=T)
        replay_data = sample(dpp)
        with th.no_grad():
            preferences = dpp.q_net_target(replay_data.observations)
            next_preferences = dpp.q_net_target(replay_data.next_observations)
        average = (th.softmax(preferences / T, 1) * preferences).sum(1, keepdim=True)
        next_average = (th.softmax(next_preferences / T, 1) * next_preferences).sum(1, keepdim=True)
        expected = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_average
        expected = expected + preferences.gather(1, replay_data.actions) - average
        assert_same(targets(dpp, replay_data), expected, **ROUNDING)
        bounded = twin(dpp, DPP, temperature=T, preference_clip=0.4)
        assert_same(targets(bounded, replay_data), expected.clamp(-0.4, 0.4), **ROUNDING)

    def test_both_parametrisations_of_dpp_add_up(self):
        # P = Q + gap: the targets of the two networks add up to the preference's
        for operator in ("boltzmann", "logsumexp"):
            dpp = make(DPP, temperature=T, operator=operator, parametrisation="q")
            replay_data = sample(dpp)
            with th.no_grad():
                preferences = dpp.q_net_target(replay_data.observations).sum(0)
                next_preferences = dpp.q_net_target(replay_data.next_observations).sum(0)
                value, next_value = (dpp._value((p,), None) for p in (preferences, next_preferences))
            q_target = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_value
            assert_same(targets(dpp, replay_data), q_target, **ROUNDING)
            losses, acting = dpp._compute_loss(replay_data, q_target)
            q_values, own_gaps = dpp.q_net(replay_data.observations)
            errors = th.nn.functional.smooth_l1_loss(own_gaps, preferences - value, reduction="none").sum(1, keepdim=True)
            current = q_values.gather(1, replay_data.actions)
            expected = th.nn.functional.smooth_l1_loss(current, q_target, reduction="none") + errors
            assert_same(losses, expected, **ROUNDING)
            assert_same(acting, (q_values + own_gaps).detach(), **ROUNDING)

    def test_momentum_dqn_with_equal_networks_is_dqn(self):
        dqn, model = make(DQN), make(MomentumDQN)
        for network in model.q_net_target.networks:
            network.load_state_dict(dqn.q_net_target.state_dict())
        replay_data = sample(dqn)
        recorded = []
        dqn.train(gradient_steps=0)
        with th.no_grad():
            next_q_values = dqn.q_net_target(replay_data.next_observations).amax(1, keepdim=True)
        recorded = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_q_values
        assert_same(targets(model, replay_data), recorded, **ROUNDING)

    @pytest.mark.parametrize("averaged", ["q_values", "targets"])
    @pytest.mark.parametrize("momentum", [0.0, 0.8, 1.0])
    def test_momentum_dqn_averages_at_the_taken_action(self, momentum, averaged):
        model = make(MomentumDQN, momentum=momentum, averaged=averaged)
        replay_data = model._extend(sample(model))
        wanted = targets(model, replay_data)
        losses, acting = model._compute_loss(replay_data, wanted)
        with th.no_grad():
            q_values, averages = model.q_net(replay_data.observations).gather(2, replay_data.actions.expand(2, -1, -1))
            old = model.q_net_target(replay_data.observations)[1].gather(1, replay_data.actions)
        new = q_values if averaged == "q_values" else wanted
        expected = th.nn.functional.smooth_l1_loss(q_values, wanted, reduction="none")
        average = momentum * old + (1 - momentum) * new
        expected = expected + th.nn.functional.smooth_l1_loss(averages, average, reduction="none")
        assert_same(losses.detach(), expected, **ROUNDING)
        assert_same(acting, model.q_net(replay_data.observations)[1].detach(), **ROUNDING)

    def test_averaging_at_the_inverse_time_rate_is_the_running_mean(self):
        model = make(MomentumDQN, momentum="inverse_time", target_update_interval=1)
        values = np.random.default_rng(0).normal(size=20)
        mean = 0.0
        for k, value in enumerate(values):
            model._n_calls = k
            weight = model._current_momentum()
            mean = weight * mean + (1 - weight) * value
            assert mean == pytest.approx(values[: k + 1].mean(), abs=1e-12)

    @pytest.mark.parametrize(("kl_coef", "ent_coef"), [(0.2, 0.1), (0.0, 0.3), (0.3, 0.0)])
    def test_the_direct_greedy_step_is_stationary_at_the_indirect_target(self, kl_coef, ent_coef):
        model = make(MirrorDescentDQN, kl_coef=kl_coef, ent_coef=ent_coef, greedy_step="direct")
        generator = th.Generator().manual_seed(0)
        q_values, previous = (th.randn(8, 4, generator=generator) for _ in range(2))
        maximiser = model._maximiser(previous, q_values, None).requires_grad_()
        args = (previous, q_values, q_values, th.zeros(8, 1, dtype=th.long), None)
        model._greedy_loss(maximiser, *args).sum().backward()
        assert maximiser.grad.abs().max() < 1e-12
        elsewhere = (maximiser.detach() + 0.1 * th.randn(8, 4, generator=generator)).requires_grad_()
        model._greedy_loss(elsewhere, *args).sum().backward()
        assert elsewhere.grad.abs().max() > 1e-4
        # The value there: (kl + ent) * log sum_a exp(momentum * log previous pi + q / (kl + ent))
        total = kl_coef + ent_coef
        logits = kl_coef / total * th.log_softmax(previous, 1) + q_values / total
        expected = total * th.logsumexp(logits, 1, keepdim=True)
        assert_same(model._value((maximiser.detach(), previous, q_values), None), expected, **ROUNDING)

    def test_mirror_descent_without_kl_is_soft_q_learning(self):
        model = make(MirrorDescentDQN, kl_coef=0.0, ent_coef=T)
        q_values, previous = th.randn(8, 3), th.randn(8, 3)
        maximiser = model._maximiser(previous, q_values, None)
        assert_same(maximiser, th.log_softmax(q_values / T, 1), **ROUNDING)
        assert_same(model._value((maximiser, previous, q_values), None), operators.soft_value(q_values, T), **ROUNDING)

    def test_evaluation_without_regularisation_is_the_expectation(self):
        model = make(MirrorDescentDQN, kl_coef=0.2, ent_coef=0.1, regularised_evaluation=False)
        q_values, previous, logits = th.randn(8, 3), th.randn(8, 3), th.randn(8, 3)
        expected = (th.softmax(logits, 1) * q_values).sum(1, keepdim=True)
        assert_same(model._value((logits, previous, q_values), None), expected, **ROUNDING)

    def test_discrete_sac_with_the_boltzmann_actor_is_sqn(self):
        model = make(SACDiscrete, ent_coef=T)
        q_values = th.randn(8, 3)
        logits = (q_values / T).requires_grad_()
        value = model._value((logits, q_values), None)
        assert_same(value.detach(), operators.soft_value(q_values, T), **ROUNDING)
        # ... where the actor's loss, minus this value, is the smallest
        value.sum().backward()
        assert logits.grad.abs().max() < 1e-12
        sqn = make(SQN, temperature=T)
        assert_same(sqn._value((q_values,), None), value.detach(), **ROUNDING)

    def test_discrete_sac_losses_by_hand(self):
        model = make(SACDiscrete, ent_coef=T, average_q=True, q_clip=0.2, entropy_penalty=0.5)
        replay_data = sample_with_entropies(model)
        wanted = th.randn(64, 1)
        losses, acting = model._compute_loss(replay_data, wanted)
        with th.no_grad():
            *critics, logits = model.q_net(replay_data.observations)
            old_critics = model.q_net_target(replay_data.observations)[:2]
        expected = th.zeros(64, 1)
        for critic, old_critic in zip(critics, old_critics, strict=True):
            q, old = critic.gather(1, replay_data.actions), old_critic.gather(1, replay_data.actions)
            clipped = old + (q - old).clamp(-0.2, 0.2)
            expected += th.maximum((q - wanted) ** 2, (clipped - wanted) ** 2)
        policy, log_policy = th.softmax(logits, 1), th.log_softmax(logits, 1)
        average = (critics[0] + critics[1]) / 2
        expected += (policy * (T * log_policy - average)).sum(1, keepdim=True)
        entropy = -(policy * log_policy).sum(1, keepdim=True)
        expected += 0.5 * (replay_data.extras["entropies"] - entropy) ** 2
        assert_same(losses.detach(), expected, **ROUNDING)
        assert_same(acting, logits)

    def test_gradients_of_actor_and_critics_are_apart(self):
        model = make(SACDiscrete, ent_coef=T)
        replay_data = sample(model)
        losses, _ = model._compute_loss(replay_data, th.randn(64, 1))
        losses.mean().backward()
        together = [parameter.grad.clone() for parameter in model.q_net.parameters()]
        n_critic = sum(1 for _ in model.q_net.networks[:2].parameters())
        # With the actor's loss alone the critics have no gradient, with the critics' alone the actor has none
        logits = model.q_net.networks[2](replay_data.observations)
        with th.no_grad():
            q_values = model.q_net.networks_of(replay_data.observations, slice(2)).amin(0)
        model.q_net.zero_grad()
        (-model._value((logits, q_values), None)).mean().backward()
        actor = [parameter.grad for parameter in model.q_net.networks[2].parameters()]
        assert_same(together[n_critic:], actor, **ROUNDING)

    def test_munchausen_in_discrete_sac_is_at_the_taken_action_and_bounded(self):
        model = make(SACDiscrete, ent_coef=T, munchausen_alpha=0.7, munchausen_clip=-0.33)
        plain = twin(model, SACDiscrete, ent_coef=T)
        replay_data = sample(model)
        with th.no_grad():
            log_policy = th.log_softmax(model.q_net.networks[-1](replay_data.observations), 1)
        bonus = 0.7 * (T * log_policy.gather(1, replay_data.actions)).clamp(-0.33, 0)
        assert (bonus > -0.7 * 0.33).any() and (bonus == -0.7 * 0.33).any()
        assert_same(targets(model, replay_data), targets(plain, replay_data) + bonus, **ROUNDING)

    def test_quantiles_that_are_constant_are_munchausen_dqn(self):
        kwargs = dict(temperature=T, munchausen_alpha=0.7, munchausen_clip=-0.15)
        iqn, dqn = make(MunchausenIQN, **kwargs), make(MunchausenDQN, **kwargs)
        with th.no_grad():
            # The embedding is a constant 1: every quantile is trunk and head alone
            for network in (iqn.q_net, iqn.q_net_target):
                network.embedding[0].weight.zero_()
                network.embedding[0].bias.fill_(1.0)
            for ours, theirs in ((iqn.q_net, dqn.q_net), (iqn.q_net_target, dqn.q_net_target)):
                theirs.q_net[0].load_state_dict(ours.trunk[0].state_dict())
                theirs.q_net[2].load_state_dict(ours.head[0].state_dict())
        replay_data = iqn._extend(sample(iqn))
        assert_same(targets(iqn, replay_data), targets(dqn, replay_data).expand(-1, 64), **ROUNDING)

    def test_quantile_targets_by_hand(self):
        model = make(MunchausenIQN, temperature=T, munchausen_alpha=0.7, n_target_quantiles=5, n_policy_quantiles=4)
        replay_data = model._extend(sample(model))
        policy_fractions, target_fractions = (replay_data.extras[f"{name}_fractions"] for name in ("policy", "target"))
        with th.no_grad():
            q_values = model.q_net_target(replay_data.observations, policy_fractions).mean(1)
            next_q_values = model.q_net_target(replay_data.next_observations, policy_fractions).mean(1)
            quantiles = model.q_net_target(replay_data.next_observations, target_fractions)
        log_policy = th.log_softmax(next_q_values / T, 1)
        next_values = (log_policy.exp().unsqueeze(1) * (quantiles - T * log_policy.unsqueeze(1))).sum(2)
        bonus = (T * th.log_softmax(q_values / T, 1)).gather(1, replay_data.actions).clamp(min=-1.0)
        expected = replay_data.rewards + 0.7 * bonus + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(model, replay_data), expected, **ROUNDING)
        # Fresh fractions for each sample and each draw
        assert policy_fractions.unique().numel() == policy_fractions.numel()
        assert not th.equal(policy_fractions, model._extend(replay_data).extras["policy_fractions"])

    def test_without_temperature_and_alpha_it_is_iqn(self):
        model = make(MunchausenIQN, temperature=0.0, munchausen_alpha=0.0, n_target_quantiles=5, n_policy_quantiles=4)
        replay_data = model._extend(sample(model))
        with th.no_grad():
            next_q_values = model.q_net_target(replay_data.next_observations, replay_data.extras["policy_fractions"]).mean(1)
            quantiles = model.q_net_target(replay_data.next_observations, replay_data.extras["target_fractions"])
        best = next_q_values.argmax(1).view(-1, 1, 1).expand(-1, 5, 1)
        next_values = quantiles.gather(2, best).squeeze(2)
        expected = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(model, replay_data), expected, **ROUNDING)


GAMMA_OF_IDENTITIES = 0.9


def sample_with_entropies(model):
    """A minibatch with made-up entropies of the behaviour."""
    entropies = th.rand(64, 1, generator=th.Generator().manual_seed(2)) * math.log(3)
    return sample(model)._replace(extras={"entropies": entropies})


# ---------------------------------------------------------------------- fixed points


def solve(algorithm, mdp, n_iterations=60, gradient_steps=20, **kwargs):
    """As in test_fixed_points, with a choice of the number of steps."""
    env = MDPEnv(mdp)
    model = make_linear(algorithm, env, exploration="eps_greedy", replay_buffer_class=WholeBuffer, **kwargs)
    fill(model.replay_buffer, env)
    for k in range(n_iterations):
        model._n_calls = k * model.target_update_interval
        model.train(gradient_steps=gradient_steps, batch_size=model.replay_buffer.size())
        model.q_net_target.load_state_dict(model.q_net.state_dict())
    states = env.observe(np.arange(N_STATES))
    return model.q_values(states), model.action_probs(states), model.soft_value(states)


@pytest.fixture(params=MDPS.values(), ids=MDPS)
def mdp(request):
    return request.param


@pytest.mark.parametrize(("temperature", "alpha"), [(T, 0.5), (T, 0.8), (0.0, 0.8), (T, 0.0)])
def test_cvi_solves_conservative_value_iteration(mdp, temperature, alpha):
    result = solve(CVI, mdp, temperature=temperature, munchausen_alpha=alpha)
    assert_solved(result, value_iteration(mdp, temperature, alpha, operator="mellowmax"))


@pytest.mark.parametrize("operator", ["boltzmann", "logsumexp"])
def test_dpp_finds_the_best_policy_while_its_gaps_grow_at_the_predicted_rate(operator):
    mdp, n_iterations = MDPS["deterministic"], 40
    optimal = value_iteration(mdp)
    exact = [
        value_iteration(
            mdp, T, 1.0, operator=dict(boltzmann="boltzmann", logsumexp="lse")[operator], tolerance=0, max_iterations=k
        )
        for k in (n_iterations, n_iterations + 1)
    ]
    results = [solve(DPP, mdp, n_iterations=k, temperature=T, operator=operator) for k in (n_iterations, n_iterations + 1)]
    for (preferences, policy, _), solution in zip(results, exact, strict=True):
        np.testing.assert_allclose(
            gaps(preferences), gaps(solution.q_values), rtol=0.01, atol=0.01 * gaps(solution.q_values).max()
        )
        np.testing.assert_allclose(policy, optimal.policy, rtol=0, atol=0.01)
    growth = gaps(results[1]) - gaps(results[0])
    np.testing.assert_allclose(growth, gaps(optimal.q_values), rtol=0, atol=0.02 * gaps(optimal.q_values).max())


def test_both_cures_of_dpp_bound_what_grows():
    mdp = MDPS["deterministic"]
    drifting = np.abs(solve(DPP, mdp, n_iterations=80, temperature=T)[0]).max()
    clipped = np.abs(solve(DPP, mdp, n_iterations=80, temperature=T, gap_clip=-0.5)[0]).max()
    optimal = value_iteration(mdp)
    bound = np.abs(optimal.q_values).max() + 2
    assert drifting > 10 * clipped and clipped < bound
    preferences, policy, _ = solve(DPP, mdp, n_iterations=80, temperature=T, parametrisation="q", gap_clip=-5.0)
    assert np.abs(preferences).max() < bound + 5
    np.testing.assert_allclose(policy, optimal.policy, atol=0.01)


def test_momentum_dqn_solves_value_iteration(mdp):
    for momentum in (0.5, "inverse_time_5"):
        q_values, policy, _ = solve(MomentumDQN, mdp, momentum=momentum)
        optimal = value_iteration(mdp)
        scale = np.abs(optimal.q_values).max()
        np.testing.assert_allclose(q_values, optimal.q_values, rtol=0, atol=0.01 * scale)
        np.testing.assert_allclose(policy, optimal.policy, rtol=0, atol=0.01)


@pytest.mark.parametrize("greedy_step", ["direct", "indirect", "dual_averaging"])
@pytest.mark.parametrize("regularised_evaluation", [True, False])
def test_mirror_descent_solves_regularised_policy_iteration(greedy_step, regularised_evaluation):
    mdp = MDPS["deterministic"]
    kwargs = dict(kl_coef=0.1, ent_coef=T, greedy_step=greedy_step, regularised_evaluation=regularised_evaluation)
    q_values, policy, _ = solve(MirrorDescentDQN, mdp, n_iterations=150, gradient_steps=40, **kwargs)
    if regularised_evaluation:
        solution = mirror_descent(mdp, 0.1, T)
        expected_q_values, expected_policy = solution.q_values, solution.policy
    else:
        # Its own fixed point: q under the softmax policy of itself, without the entropy
        expected_q_values = np.zeros((mdp.n_states, mdp.n_actions))
        for _ in range(300):
            expected_policy = np.exp(expected_q_values / T)
            expected_policy /= expected_policy.sum(1, keepdims=True)
            expected_q_values = mdp.action_values((expected_policy * expected_q_values).sum(1))
    scale = np.abs(expected_q_values).max()
    np.testing.assert_allclose(q_values, expected_q_values, rtol=0, atol=0.01 * scale)
    np.testing.assert_allclose(policy, expected_policy, rtol=0, atol=0.01)


def test_discrete_sac_solves_soft_value_iteration(mdp):
    q_values, policy, values = solve(SACDiscrete, mdp, n_iterations=100, gradient_steps=40, ent_coef=T)
    assert_solved((q_values, policy, values), value_iteration(mdp, T))


@pytest.mark.parametrize(("temperature", "alpha"), [(T, 0.5), (T, 0.0), (0.0, 0.0)])
def test_iqn_solves_what_munchausen_dqn_solves(temperature, alpha):
    mdp = MDPS["deterministic"]
    kwargs = dict(temperature=temperature, munchausen_alpha=alpha, munchausen_clip=-math.inf)
    kwargs |= dict(n_quantiles=4, n_target_quantiles=4, n_policy_quantiles=4)
    result = solve(MunchausenIQN, mdp, n_iterations=80, gradient_steps=40, **kwargs)
    assert_solved(result, value_iteration(mdp, temperature, alpha))
