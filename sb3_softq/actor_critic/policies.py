"""Policies of the actor-critic family: actors, critics and their targets."""

import math
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_softq.checks import check_bool, check_integer, check_number
from sb3_softq.losses import gaussian_sample

# Added to a standard deviation, which would otherwise reach 0
MIN_STD = 1e-4

# Numbers of a hidden layer that stay in the cache of a processor's core
CACHE_SIZE = 2**17


def softplus_inverse(value: float) -> float:
    """
    The number whose softplus is ``value``.

    :param value: a positive number
    """
    return value + math.log(-math.expm1(-value))


class Actor(BasePolicy):
    """
    Features, hidden layers, and a head that the subclass adds.

    :param observation_space: observation space
    :param action_space: action space
    :param net_arch: units of the hidden layers
    :param features_extractor: network to extract features
    :param features_dim: number of features
    :param activation_fn: activation of the hidden layers
    :param normalize_images: whether to divide images by 255
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,  # type: ignore[arg-type]
            normalize_images=normalize_images,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        input_dim = features_dim + self.noise_dim
        self.latent_dim = net_arch[-1] if net_arch else input_dim
        self.latent_pi = nn.Sequential(*create_mlp(input_dim, -1, net_arch, activation_fn))

    @property
    def noise_dim(self) -> int:
        """Number of random inputs beside the features."""
        return 0

    def latent(self, obs: PyTorchObs) -> th.Tensor:
        """
        The last hidden layer.

        :param obs: observations
        :return: ``(batch_size, latent_dim)``
        """
        return self.latent_pi(self.extract_features(obs, self.features_extractor))  # type: ignore[arg-type]


class GaussianActor(Actor):
    """
    Gaussian policy whose samples are clipped to the range of the actions, not squashed.

    :param full_covariance: whether actions are correlated: a Cholesky factor instead of standard deviations
    :param initial_std: standard deviation of an untrained network, in actions scaled to [-1, 1]
    """

    def __init__(self, *args: Any, full_covariance: bool = False, initial_std: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full_covariance = full_covariance
        self.initial_std = initial_std
        action_dim = get_action_dim(self.action_space)
        self.mean = nn.Linear(self.latent_dim, action_dim)
        self.scale = nn.Linear(self.latent_dim, action_dim)
        if full_covariance:
            self.correlations = nn.Linear(self.latent_dim, action_dim * (action_dim - 1) // 2)
            self.register_buffer("lower", th.tril_indices(action_dim, action_dim, -1), persistent=False)

    def forward(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        Parameters of the Gaussian, in actions scaled to [-1, 1].

        :param obs: observations
        :return: mean ``(batch_size, action_dim)``, and standard deviations of the same shape, or a lower Cholesky factor
            ``(batch_size, action_dim, action_dim)``
        """
        latent = self.latent(obs)
        mean = self.mean(latent)
        # initial_std where the layer gives 0, and proportional to it: steps are alike for any initial_std
        scale = self.initial_std / math.log(2) * F.softplus(self.scale(latent)) + MIN_STD
        if not self.full_covariance:
            return mean, scale
        cholesky = th.diag_embed(scale)
        cholesky[:, self.lower[0], self.lower[1]] = self.initial_std * self.correlations(latent)  # type: ignore[index]
        return mean, cholesky

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        mean, scale = self(observation)
        actions = mean if deterministic else gaussian_sample(mean, scale, 1).squeeze(1)
        return actions.clamp(-1, 1)


class CategoricalActor(Actor):
    """Policy over Discrete actions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits = nn.Linear(self.latent_dim, int(self.action_space.n))  # type: ignore[attr-defined]

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Log-probabilities of the actions.

        :param obs: observations
        :return: ``(batch_size, n_actions)``
        """
        return th.log_softmax(self.logits(self.latent(obs)), dim=1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        log_policy = self(observation)
        return log_policy.argmax(dim=1) if deterministic else th.multinomial(log_policy.exp(), 1).squeeze(1)


class SamplingActor(Actor):
    """
    Network that turns noise into actions: it can have any density, and be sampled but not evaluated.

    Haarnoja et al. 2017 (arXiv:1702.08165), section 3.2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output = nn.Linear(self.latent_dim, self.noise_dim)

    @property
    def noise_dim(self) -> int:
        return get_action_dim(self.action_space)

    def draw_noise(self, batch_size: int, n_particles: int) -> th.Tensor:
        """
        Random inputs.

        :param batch_size: number of states
        :param n_particles: number of particles in each
        :return: ``(batch_size, n_particles, action_dim)``
        """
        weight = self.output.weight
        return th.randn(batch_size, n_particles, self.noise_dim, device=weight.device, dtype=weight.dtype)

    def forward(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        Particles, before they are squashed to the range of the actions.

        :param obs: observations
        :param noise: random inputs, ``(batch_size, n_particles, action_dim)``
        :return: ``(batch_size, n_particles, action_dim)``
        """
        features = self.extract_features(obs, self.features_extractor)  # type: ignore[arg-type]
        return shared_first_layer([*self.latent_pi, self.output], features, noise)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        batch_size = len(self.extract_features(observation, self.features_extractor))  # type: ignore[arg-type]
        return th.tanh(self(observation, self.draw_noise(batch_size, 1))).squeeze(1)


class DiscreteCritic(BaseModel):
    """
    Values of all Discrete actions, by several networks over one features extractor.

    :param observation_space: observation space
    :param action_space: action space
    :param net_arch: units of the hidden layers
    :param features_extractor: network to extract features
    :param features_dim: number of features
    :param activation_fn: activation of the hidden layers
    :param normalize_images: whether to divide images by 255
    :param n_critics: number of networks
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        n_actions = int(action_space.n)
        networks = [nn.Sequential(*create_mlp(features_dim, n_actions, net_arch, activation_fn)) for _ in range(n_critics)]
        self.q_networks = nn.ModuleList(networks)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Action values.

        :param obs: observations
        :return: ``(n_critics, batch_size, n_actions)``
        """
        features = self.extract_features(obs, self.features_extractor)  # type: ignore[arg-type]
        return th.stack([q_network(features) for q_network in self.q_networks])


def sampled_q_values(critic: ContinuousCritic, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
    """
    Values of several actions in each state; the features of a state are computed once, and without gradients a processor
    takes as many states at a time as the caches of its cores hold.

    :param critic: SB3's critic
    :param obs: observations
    :param actions: scaled to [-1, 1], ``(batch_size, n_samples, action_dim)``
    :return: ``(n_critics, batch_size, n_samples)``
    """
    features = critic.extract_features(obs, critic.features_extractor)  # type: ignore[arg-type]
    networks = [list(q_network.children()) for q_network in critic.q_networks]
    n_states = len(features)
    if features.device.type == "cpu" and not th.is_grad_enabled():
        n_units = len(next(critic.q_networks[0].parameters()))
        n_states = max(CACHE_SIZE * th.get_num_threads() // (actions.shape[1] * n_units), 1)
    pieces = list(zip(features.split(n_states), actions.split(n_states), strict=True))
    return th.stack([th.cat([shared_first_layer(layers, *piece) for piece in pieces]) for layers in networks]).squeeze(3)


def shared_first_layer(layers: list[nn.Module], features: th.Tensor, others: th.Tensor) -> th.Tensor:
    """
    A perceptron's output for several inputs that have their first part in common, whose share is computed once.

    :param layers: of the perceptron, the first of them linear
    :param features: the common part, ``(batch_size, features_dim)``
    :param others: the other part, ``(batch_size, n_samples, other_dim)``
    :return: ``(batch_size, n_samples, output_dim)``
    """
    first = layers[0]
    assert isinstance(first, nn.Linear)
    feature_weight, other_weight = first.weight.split([features.shape[1], others.shape[2]], dim=1)
    hidden = F.linear(features, feature_weight, first.bias).unsqueeze(1) + F.linear(others, other_weight)
    for layer in layers[1:]:
        hidden = layer(hidden)
    return hidden


class CriticActorPolicy(BasePolicy):
    """
    An actor, critics and the critics' targets, with an optimiser for each of the first two.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param net_arch: units of the hidden layers, ``[256, 256]`` by default; ``dict(pi=[...], qf=[...])`` for different ones
    :param activation_fn: activation of the hidden layers
    :param features_extractor_class: features extractor to use, a network of its own for actor and critics; None for the
        one of the class
    :param features_extractor_kwargs: keyword arguments of the features extractor
    :param normalize_images: whether to divide images by 255
    :param optimizer_class: the optimiser, Adam by default
    :param optimizer_kwargs: its keyword arguments, but the learning rate
    :param n_critics: number of critics, of whose values the smallest counts
    """

    default_features_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    actor: Actor
    critic: ContinuousCritic | DiscreteCritic
    critic_target: ContinuousCritic | DiscreteCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
            normalize_images=normalize_images,
        )
        check_integer("n_critics in policy_kwargs", n_critics, 1)
        self.net_arch = [256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.n_critics = n_critics
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.critic = self.make_critic()
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)
        for network in (self.actor, self.critic):
            network.optimizer = self.optimizer_class(network.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _network_kwargs(self, net_arch: list[int]) -> dict[str, Any]:
        kwargs = dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            net_arch=net_arch,
            activation_fn=self.activation_fn,
            normalize_images=self.normalize_images,
        )
        return self._update_features_extractor(kwargs)

    def make_actor(self) -> Actor:
        """Build an actor."""
        raise NotImplementedError

    def make_critic(self) -> ContinuousCritic | DiscreteCritic:
        """Build the critics."""
        kwargs = self._network_kwargs(get_actor_critic_arch(self.net_arch)[1])
        if isinstance(self.action_space, spaces.Discrete):
            return DiscreteCritic(**kwargs, n_critics=self.n_critics).to(self.device)
        return ContinuousCritic(**kwargs, n_critics=self.n_critics, share_features_extractor=False).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            **super()._get_constructor_parameters(),
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            lr_schedule=self._dummy_schedule,  # not needed for loading a policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            n_critics=self.n_critics,
        )

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor._predict(observation, deterministic)

    def set_training_mode(self, mode: bool) -> None:
        # Target networks stay in evaluation mode
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode


class MPOPolicy(CriticActorPolicy):
    """
    Policy of MPO and RERPI: Gaussian for Box actions, categorical for Discrete ones, with a target of its own.

    Parameters not described here are those of :class:`CriticActorPolicy`.

    :param full_covariance: whether the Gaussian has a full covariance instead of independent actions
    :param initial_std: standard deviation of the untrained Gaussian, in actions scaled to [-1, 1]
    """

    actor: GaussianActor | CategoricalActor
    actor_target: GaussianActor | CategoricalActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        full_covariance: bool = False,
        initial_std: float = 0.5,
    ) -> None:
        check_bool("full_covariance in policy_kwargs", full_covariance)
        check_number("initial_std in policy_kwargs", initial_std, positive=True)
        self.full_covariance = full_covariance
        self.initial_std = initial_std
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.actor_target = self.make_actor()
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.actor_target.set_training_mode(False)

    def make_actor(self) -> GaussianActor | CategoricalActor:
        kwargs = self._network_kwargs(get_actor_critic_arch(self.net_arch)[0])
        if isinstance(self.action_space, spaces.Discrete):
            return CategoricalActor(**kwargs).to(self.device)
        kwargs.update(full_covariance=self.full_covariance, initial_std=self.initial_std)
        return GaussianActor(**kwargs).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        gaussian = dict(full_covariance=self.full_covariance, initial_std=self.initial_std)
        return dict(**super()._get_constructor_parameters(), **gaussian)


class CnnMPOPolicy(MPOPolicy):
    """:class:`MPOPolicy` for images."""

    default_features_extractor = NatureCNN


class MultiInputMPOPolicy(MPOPolicy):
    """:class:`MPOPolicy` for Dict observations."""

    default_features_extractor = CombinedExtractor


class SoftQPolicy(CriticActorPolicy):
    """
    Policy of soft Q-learning: a network that samples, and critics that choose among its particles.

    Parameters not described here are those of :class:`CriticActorPolicy`.

    :param n_candidates: particles of which the deterministic action is the one of the highest value; their noise is drawn
        once, so that an observation has one such action
    """

    actor: SamplingActor
    critic: ContinuousCritic
    critic_target: ContinuousCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        n_candidates: int = 32,
    ) -> None:
        check_integer("n_candidates in policy_kwargs", n_candidates, 1)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
            n_critics,
        )
        self.n_candidates = n_candidates
        self.register_buffer("candidate_noise", self.actor.draw_noise(1, n_candidates))

    def make_actor(self) -> SamplingActor:
        return SamplingActor(**self._network_kwargs(get_actor_critic_arch(self.net_arch)[0])).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(**super()._get_constructor_parameters(), n_candidates=self.n_candidates)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not deterministic:
            return self.actor._predict(observation)
        actions = th.tanh(self.actor(observation, self.candidate_noise))
        best = sampled_q_values(self.critic, observation, actions).amin(dim=0).argmax(dim=1)
        return actions[th.arange(len(actions), device=actions.device), best]


class CnnSoftQPolicy(SoftQPolicy):
    """:class:`SoftQPolicy` for images."""

    default_features_extractor = NatureCNN


class MultiInputSoftQPolicy(SoftQPolicy):
    """:class:`SoftQPolicy` for Dict observations."""

    default_features_extractor = CombinedExtractor
