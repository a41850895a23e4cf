"""Identities and fixed points of the rest of the discrete family: DPP, CVI, MoDQN, MD-DQN, MIQN, SACDiscrete."""

import functools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import Float64Extractor, MaskedEnv, RecordedEnv, assert_same, fill_buffer, make_model
from stable_baselines3 import DQN
from test_fixed_points import GAMMA, MDPS, N_STATES, MDPEnv, WholeBuffer, assert_solved, fill, gaps, make_linear
from test_identities import ROUNDING, copy_networks, make, sample, targets, train_alike

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
        shift = (GAMMA_OF_IDENTITIES * (1 - replay_data.dones)) * (T * math.log(3) * th.ones(1))
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
        # Without momentum the average of the targets learns what Q learns, so that both stay the same network
        kwargs = dict(max_grad_norm=math.inf, learning_rate=0.01)
        dqn, model = make(DQN, **kwargs), make(MomentumDQN, momentum=0.0, averaged="targets", **kwargs)
        for ours, theirs in ((model.q_net, dqn.q_net), (model.q_net_target, dqn.q_net_target)):
            for network in ours.networks:
                network.load_state_dict(theirs.state_dict())
        before = deepcopy(dqn.q_net.state_dict())
        train_alike(dqn, model)
        for network in model.q_net.networks:
            assert_same(network.state_dict(), dqn.q_net.state_dict(), **ROUNDING)
        assert max((before[name] - value).abs().max() for name, value in dqn.q_net.state_dict().items()) > 1e-3

    def test_momentum_dqn_values_the_best_action_of_the_average_by_q(self):
        model = make(MomentumDQN)
        replay_data = sample(model)
        with th.no_grad():
            q_values, averages = model.q_net_target(replay_data.next_observations)
        best = averages.argmax(1, keepdim=True)
        assert (best != q_values.argmax(1, keepdim=True)).any()
        next_values = GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * q_values.gather(1, best)
        assert_same(targets(model, replay_data), replay_data.rewards + next_values, **ROUNDING)

    @pytest.mark.parametrize("greedy_step", ["direct", "indirect", "dual_averaging"])
    def test_mirror_descent_targets_and_losses_by_hand(self, greedy_step):
        kl_coef, ent_coef = 0.2, 0.1
        model = make(MirrorDescentDQN, kl_coef=kl_coef, ent_coef=ent_coef, greedy_step=greedy_step)
        replay_data = sample(model)
        scale = ent_coef if greedy_step == "dual_averaging" else 1.0
        with th.no_grad():
            (q_values, logits), (old_q_values, old_logits), (_, next_logits), (next_q_values, next_old_logits) = (
                network(observations)
                for observations in (replay_data.observations, replay_data.next_observations)
                for network in (model.q_net, model.q_net_target)
            )
        # <pi, q> - kl_coef * KL(pi || previous pi) + ent_coef * H(pi), pi the online network's, the rest the target's
        log_policy, log_previous = (th.log_softmax(values / scale, 1) for values in (next_logits, next_old_logits))
        inside = next_q_values - kl_coef * (log_policy - log_previous) - ent_coef * log_policy
        value = (log_policy.exp() * inside).sum(1, keepdim=True)
        wanted = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * value
        assert_same(targets(model, replay_data), wanted, **ROUNDING)
        losses, acting = model._compute_loss(replay_data, wanted)
        huber = functools.partial(th.nn.functional.smooth_l1_loss, reduction="none")
        taken = [values.gather(1, replay_data.actions) for values in (q_values, logits, old_logits)]
        expected = huber(taken[0], wanted)
        log_policy, log_previous = (th.log_softmax(values / scale, 1) for values in (logits, old_logits))
        if greedy_step == "direct":
            inside = old_q_values - kl_coef * (log_policy - log_previous) - ent_coef * log_policy
            expected = expected - (log_policy.exp() * inside).sum(1, keepdim=True)
        elif greedy_step == "indirect":
            best = th.softmax(2 / 3 * log_previous + old_q_values / 0.3, 1)
            expected = expected - (best * log_policy).sum(1, keepdim=True)
        else:
            expected = expected + huber(taken[1], 2 / 3 * taken[2] + 1 / 3 * taken[0])
        assert_same(losses.detach(), expected, **ROUNDING)
        assert_same(acting, logits)

    def test_dual_averaging_without_regularisation_is_momentum_dqn(self):
        momentum = make(MomentumDQN, momentum=0.75)
        kwargs = dict(kl_coef=0.75e-9, ent_coef=0.25e-9, regularised_evaluation=False)
        mirror = twin(momentum, MirrorDescentDQN, greedy_step="dual_averaging", **kwargs)
        for model in (momentum, mirror):  # one acts on the new average, the other on the previous one
            model.q_net.networks[1].load_state_dict(model.q_net_target.networks[1].state_dict())
        replay_data = momentum._extend(sample(momentum))
        wanted = targets(momentum, replay_data)
        assert_same(targets(mirror, replay_data), wanted, **ROUNDING)
        losses = [model._compute_loss(replay_data, wanted)[0] for model in (momentum, mirror)]
        assert_same(*losses, **ROUNDING)

    def test_cvi_without_gap_and_temperature_is_dqn(self):
        cvi = make(CVI, temperature=0.0, munchausen_alpha=0.0)
        replay_data = sample(cvi)
        with th.no_grad():
            next_values = cvi.q_net_target(replay_data.next_observations).amax(dim=1, keepdim=True)
        expected = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(cvi, replay_data), expected, **ROUNDING)

    def test_cvi_of_full_weight_is_dpp_l_but_for_a_constant(self):
        dpp = make(DPP, temperature=T, operator="logsumexp")
        cvi = twin(dpp, CVI, temperature=T)
        cvi.munchausen_alpha = 1.0  # which the constructor refuses, since it drifts
        replay_data = sample(dpp)
        discounts = GAMMA_OF_IDENTITIES * (1 - replay_data.dones)  # in the float32 of the buffer
        shift = (1 - discounts.double()) * (T * math.log(3))
        assert_same(targets(cvi, replay_data), targets(dpp, replay_data) + shift, **ROUNDING)

    def test_munchausen_without_clip_is_cvi_with_the_log_sum_exp(self):
        class SoftCVI(CVI):
            _operator = staticmethod(operators.soft_value)

        munchausen = make(MunchausenDQN, temperature=T, munchausen_alpha=0.7, munchausen_clip=-math.inf)
        cvi = twin(munchausen, SoftCVI, temperature=T, munchausen_alpha=0.7)
        assert_same(targets(cvi, sample(cvi)), targets(munchausen, sample(cvi)), **ROUNDING)

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
            model._n_iterations = k
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

    def test_discrete_sac_takes_the_online_actor_and_the_smaller_target_critic(self):
        model = make(SACDiscrete, ent_coef=T)
        replay_data = sample(model)
        with th.no_grad():
            first, second, _ = model.q_net_target(replay_data.next_observations)
            log_policy = th.log_softmax(model.q_net(replay_data.next_observations)[2], 1)
        next_values = (log_policy.exp() * (th.minimum(first, second) - T * log_policy)).sum(1, keepdim=True)
        expected = replay_data.rewards + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(model, replay_data), expected, **ROUNDING)
        # The target of SQN, where the actor is the softmax of these critics
        sqn = make(SQN, temperature=T)
        for ours, theirs in zip(model.q_net_target.networks, sqn.q_net_target.networks, strict=False):
            theirs.load_state_dict(ours.state_dict())
        model.q_net.networks[-1].forward = lambda observations: model.q_net_target(observations)[:2].amin(0) / T
        assert_same(targets(model, replay_data), targets(sqn, replay_data), **ROUNDING)

    @pytest.mark.parametrize("factorisation", ["sum", "independent"])
    def test_the_entropy_penalty_of_several_heads(self, factorisation):
        env = RecordedEnv(spaces.MultiDiscrete([2, 3]))
        kwargs = dict(policy_kwargs=dict(net_arch=[16], features_extractor_class=Float64Extractor), ent_coef=T)
        models = [make_model(SACDiscrete, env, entropy_penalty=p, factorisation=factorisation, **kwargs) for p in (0.0, 0.5)]
        fill_buffer(models[1], 100)
        replay_data = models[1]._sample(40)
        wanted = th.randn(80 if factorisation == "independent" else 40, 1)
        without, with_penalty = (model._compute_loss(replay_data, wanted)[0] for model in models)
        logits = models[1].q_net(replay_data.observations)[2]
        heads = (th.distributions.Categorical(logits=logits[:, columns]) for columns in ([0, 1], [3, 4, 5]))
        difference = replay_data.extras["entropies"] - th.stack([head.entropy() for head in heads], 1)
        penalty = difference.sum(1, keepdim=True) ** 2 if factorisation == "sum" else difference.reshape(-1, 1) ** 2
        assert_same((with_penalty - without).detach(), 0.5 * penalty.detach(), **ROUNDING)

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

    def test_the_embedding_is_that_of_the_cosines(self):
        model = make(MunchausenIQN, policy_kwargs=dict(n_cosines=5))
        assert (model.n_quantiles, model.n_target_quantiles, model.n_policy_quantiles) == (64, 64, 32)
        network, obs = model.q_net, th.rand(2, 4)
        fractions = th.tensor([[0.1, 0.7, 1.0], [0.0, 0.3, 0.5]])
        with th.no_grad():
            quantiles = network(obs, fractions)
            features = th.relu(network.trunk[0](obs))
            for row, column in np.ndindex(2, 3):
                cosines = th.tensor([math.cos(math.pi * i * fractions[row, column]) for i in range(5)])
                expected = network.head[0](features[row] * th.relu(network.embedding[0](cosines)))
                assert_same(quantiles[row, column], expected, rtol=0, atol=1e-6)  # the frequencies are in float32

    @pytest.mark.parametrize("alpha", [0.7, 0.0])
    def test_quantile_targets_by_hand(self, alpha):
        model = make(MunchausenIQN, temperature=T, munchausen_alpha=alpha, n_target_quantiles=5, n_policy_quantiles=4)
        replay_data = model._extend(sample(model))
        policy_fractions, target_fractions = (replay_data.extras[f"{name}_fractions"] for name in ("policy", "target"))
        with th.no_grad():
            q_values = model.q_net_target(replay_data.observations, policy_fractions).mean(1)
            next_q_values = model.q_net_target(replay_data.next_observations, policy_fractions).mean(1)
            quantiles = model.q_net_target(replay_data.next_observations, target_fractions)
        log_policy = th.log_softmax(next_q_values / T, 1)
        next_values = (log_policy.exp().unsqueeze(1) * (quantiles - T * log_policy.unsqueeze(1))).sum(2)
        bonus = (T * th.log_softmax(q_values / T, 1)).gather(1, replay_data.actions).clamp(min=-1.0)
        expected = replay_data.rewards + alpha * bonus + GAMMA_OF_IDENTITIES * (1 - replay_data.dones) * next_values
        assert_same(targets(model, replay_data), expected, **ROUNDING)
        # Fresh fractions for each sample and each draw, those of the policy one of each quarter
        assert ((policy_fractions * 4).floor() == th.arange(4)).all()
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


def test_the_decaying_rate_counts_what_was_learned():
    model = make_model(
        MomentumDQN,
        momentum="inverse_time",
        learning_starts=50,
        train_freq=10,
        target_update_interval=5,
        learning_rate=0.1,
    )
    momenta, inputs = [], model._inputs
    model._inputs = lambda n: momenta.append(model._current_momentum()) or inputs(n)
    model.learn(110)
    # Ten updates of the target network copied what was random still, and every second one copies nothing new
    assert momenta == pytest.approx([1 - 1 / (1 + k) for k in range(6)])


@pytest.mark.parametrize("masked", [False, True])
def test_entropies_are_stored_as_they_were_when_the_actions_were_taken(masked):
    env = (MaskedEnv if masked else RecordedEnv)(spaces.MultiDiscrete([2, 3]))
    model = make_model(SACDiscrete, env, entropy_penalty=0.5, learning_starts=20, train_freq=1, gradient_steps=0)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.5 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0))
    model.learn(60)
    stored = model.replay_buffer.extras["entropies"][:60, 0]
    history = env.history
    for i, step in enumerate(history):
        mask = np.ones(5, dtype=bool) if step["mask"] is None else step["mask"]
        logits = model.q_net(th.as_tensor(step["obs"])[None])[2, 0] * (i >= 20)
        heads = (logits[columns][mask[rows]] for columns, rows in (([0, 1], [0, 1]), ([3, 4, 5], [2, 3, 4])))
        expected = [th.distributions.Categorical(logits=head).entropy().item() for head in heads]
        np.testing.assert_allclose(stored[i], expected, atol=1e-6)
    assert len(history) == 60


# ---------------------------------------------------------------------- fixed points


def train_on(algorithm, mdp, n_iterations=30, gradient_steps=20, learning_rate=None, **kwargs):
    """A trained model and its states, as in test_fixed_points; DPP, which never forgets, starts at zero. By Adam at a rate."""
    env = MDPEnv(mdp)
    kwargs |= dict(exploration="eps_greedy", replay_buffer_class=WholeBuffer)
    if learning_rate is None:
        model = make_linear(algorithm, env, **kwargs)
    else:
        model = make_model(algorithm, env, policy_kwargs=dict(net_arch=[]), learning_rate=learning_rate, gamma=GAMMA, **kwargs)
    fill(model.replay_buffer, env)
    with th.no_grad():
        for network in (model.q_net, model.q_net_target):
            for parameter in network.parameters():
                parameter *= 0.0 if algorithm is DPP else 1.0
    for k in range(n_iterations):
        model._n_iterations = k  # which a training of a MomentumDQN counts
        model.train(gradient_steps=gradient_steps, batch_size=model.replay_buffer.size())
        model.q_net_target.load_state_dict(model.q_net.state_dict())
    return model, env.observe(np.arange(N_STATES))


def solve(*args, **kwargs):
    """The action values, policies and values of all states, see :func:`train_on`."""
    model, states = train_on(*args, **kwargs)
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
    mdp, name = MDPS["deterministic"], dict(boltzmann="boltzmann", logsumexp="lse")[operator]
    optimal, results = value_iteration(mdp), []
    for n_iterations in (20, 21):
        exact = gaps(value_iteration(mdp, T, 1.0, operator=name, tolerance=0, max_iterations=n_iterations).q_values)
        result = solve(DPP, mdp, n_iterations=n_iterations, gradient_steps=80, temperature=T, operator=operator)
        np.testing.assert_allclose(gaps(result[0]), exact, rtol=0, atol=1e-4 * exact.max())
        results.append(result)
    growth = gaps(results[1][0]) - gaps(results[0][0])
    np.testing.assert_allclose(growth, gaps(optimal.q_values), rtol=0, atol=0.01 * growth.max())
    clear = clear_states(optimal)
    np.testing.assert_allclose(results[1][1][clear], optimal.policy[clear], rtol=0, atol=0.01)


def clear_states(solution):
    """Where the second best action is clearly not as good."""
    clear = np.sort(gaps(solution.q_values), axis=1)[:, 1] > 0.1
    assert clear.sum() >= 3
    return clear


def test_both_cures_of_dpp_bound_what_grows():
    mdp = MDPS["deterministic"]
    drifting = np.abs(solve(DPP, mdp, n_iterations=80, temperature=T)[0]).max()
    clipped = np.abs(solve(DPP, mdp, n_iterations=80, temperature=T, gap_clip=-0.5)[0]).max()
    optimal = value_iteration(mdp)
    bound = np.abs(optimal.q_values).max() + 2
    assert drifting > 10 * clipped and clipped < bound
    preferences, policy, _ = solve(
        DPP, mdp, n_iterations=60, learning_rate=0.05, temperature=T, parametrisation="q", gap_clip=-5.0
    )
    assert np.abs(preferences).max() < bound + 5
    clear = clear_states(optimal)
    np.testing.assert_allclose(policy[clear], optimal.policy[clear], atol=0.01)


def test_bounded_targets_and_q_of_its_own_stay_of_the_size_of_the_values():
    mdp = MDPS["deterministic"]
    optimal = value_iteration(mdp)
    largest = np.abs(optimal.q_values).max()
    clear = clear_states(optimal)
    model, states = train_on(DPP, mdp, n_iterations=60, temperature=T, preference_clip=largest + 1)
    assert np.abs(model.q_values(states)).max() < largest + 1.1
    np.testing.assert_allclose(model.action_probs(states)[clear], optimal.policy[clear], atol=0.01)
    # P drifts as it does without a cure, and Q does not
    model, states = train_on(DPP, mdp, n_iterations=60, learning_rate=0.05, temperature=T, parametrisation="q")
    assert np.abs(model.q_values(states)).max() > 5 * largest
    assert model.q_net(th.as_tensor(states))[0].abs().max() < 1.2 * largest
    np.testing.assert_allclose(model.action_probs(states)[clear], optimal.policy[clear], atol=0.01)


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
    q_values, policy, _ = solve(MirrorDescentDQN, mdp, n_iterations=40, gradient_steps=60, **kwargs)
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
    q_values, policy, values = solve(SACDiscrete, mdp, n_iterations=40, gradient_steps=40, learning_rate=0.03, ent_coef=T)
    assert_solved((q_values, policy, values), value_iteration(mdp, T))


@pytest.mark.parametrize(("temperature", "alpha"), [(T, 0.5), (T, 0.0), (0.0, 0.0)])
def test_iqn_solves_what_munchausen_dqn_solves(temperature, alpha):
    mdp = MDPS["deterministic"]
    kwargs = dict(temperature=temperature, munchausen_alpha=alpha, munchausen_clip=-math.inf)
    kwargs |= dict(n_quantiles=4, n_target_quantiles=4, n_policy_quantiles=4)
    result = solve(MunchausenIQN, mdp, n_iterations=40, gradient_steps=40, learning_rate=0.01, **kwargs)
    assert_solved(result, value_iteration(mdp, temperature, alpha))
