"""Policies of the value-based family: action-value networks, their targets and the features extractors they need."""

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.dqn.policies import QNetwork as DQNQNetwork
from torch import nn

from sb3_softq.actions import ActionLayout, greedy_actions
from sb3_softq.mlp import relu_mlp, relu_mlp_layers

# Smallest height and width that NatureCNN's three convolutions can read
NATURE_CNN_MIN_SIZE = 36


# Modules that are the same in training and in evaluation mode
MODELESS_MODULES = (
    nn.Linear, nn.Conv2d, nn.Flatten, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.LayerNorm, nn.Identity,
    nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Mish, nn.Sigmoid,
)  # fmt: skip


def is_vector_space(observation_space: spaces.Space) -> bool:
    """
    Whether observations are vectors of numbers.

    :param observation_space: observation space of the environment
    """
    return isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1


class SmallImageCNN(BaseFeaturesExtractor):
    """
    Extractor for small planes, such as MinAtar's 10x10 boolean ones: a 3x3 convolution and a linear layer.

    The network of Young and Tian 2019 (arXiv:1903.03176). Reads channels first or last, whichever is the smaller
    dimension; last when both are equal, which is Gymnasium's order.

    :param observation_space: ``(height, width, channels)`` or ``(channels, height, width)``, at least 3x3
    :param features_dim: number of features extracted
    :param n_filters: number of filters of the convolution
    :raises ValueError: for a space of another shape
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128, n_filters: int = 16) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width = _image_shape(observation_space)
        if min(height, width) < 3:
            raise ValueError(f"SmallImageCNN reads planes of at least 3x3, not {observation_space}: use MlpPolicy")
        self.channels_last = observation_space.shape[0] >= observation_space.shape[-1]
        self.cnn = nn.Sequential(nn.Conv2d(channels, n_filters, kernel_size=3), nn.ReLU(), nn.Flatten())
        self.linear = nn.Sequential(nn.Linear(n_filters * (height - 2) * (width - 2), features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.channels_last:
            observations = observations.permute(0, 3, 1, 2)
        return self.linear(self.cnn(observations))


def _image_shape(observation_space: spaces.Box) -> tuple[int, int, int]:
    """Channels, height and width of an image space, whichever end its channels are at."""
    first, middle, last = observation_space.shape
    return (first, middle, last) if first < last else (last, first, middle)


def image_extractor(observation_space: spaces.Space) -> type[BaseFeaturesExtractor]:
    """
    The extractor for an image space: NatureCNN, or :class:`SmallImageCNN` where NatureCNN does not fit.

    :param observation_space: observation space of the environment
    :return: the class to build
    :raises ValueError: if the space is no image
    """
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
        raise ValueError(
            f"CnnPolicy reads images (a Box of three dimensions), not observation_space={observation_space}: "
            f"use {'MultiInputPolicy' if isinstance(observation_space, spaces.Dict) else 'MlpPolicy'}"
        )
    if min(_image_shape(observation_space)[1:]) < NATURE_CNN_MIN_SIZE:
        return SmallImageCNN
    if not is_image_space(observation_space):
        raise ValueError(
            f"CnnPolicy reads planes of {NATURE_CNN_MIN_SIZE}x{NATURE_CNN_MIN_SIZE} and more as uint8 images in [0, 255], not "
            f"observation_space={observation_space}. For normalised, channels-first images pass policy_kwargs="
            "dict(features_extractor_class=NatureCNN, features_extractor_kwargs=dict(normalized_image=True), "
            "normalize_images=False)"
        )
    return NatureCNN


class ImageCombinedExtractor(CombinedExtractor):
    """
    SB3's ``CombinedExtractor``, except that small images get the extractor that can read them.

    :param observation_space: a Dict of Boxes and other spaces that SB3 can flatten
    :param cnn_output_dim: number of features of each image
    """

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int = 256) -> None:
        BaseFeaturesExtractor.__init__(self, observation_space, features_dim=1)
        extractors: dict[str, nn.Module] = {}
        features_dim = 0
        for key, subspace in observation_space.spaces.items():
            if is_image_space(subspace):
                extractors[key] = image_extractor(subspace)(subspace, features_dim=cnn_output_dim)  # type: ignore[call-arg]
                features_dim += cnn_output_dim
            else:
                extractors[key] = nn.Flatten()
                features_dim += get_flattened_obs_dim(subspace)
        self.extractors = nn.ModuleDict(extractors)
        self._features_dim = features_dim


class DuelingHead(nn.Module):
    """
    Separate streams for the value and the advantages, ``q = v + advantage - mean(advantage)``.

    Wang et al. 2016 (arXiv:1511.06581), equation 9.

    With several heads of actions, each has a value of its own.

    :param input_dim: number of features
    :param hidden_units: units of the hidden layer of each stream; none for linear streams
    :param layout: the heads of actions
    :param activation_fn: activation of the hidden layers
    """

    def __init__(self, input_dim: int, hidden_units: list[int], layout: ActionLayout, activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.layout = layout
        self.value = nn.Sequential(*create_mlp(input_dim, layout.n_heads, hidden_units, activation_fn))
        self.advantage = nn.Sequential(*create_mlp(input_dim, layout.n_values, hidden_units, activation_fn))

    def forward(self, features: th.Tensor) -> th.Tensor:
        advantage, value = self.advantage(features), self.value(features)
        if self.layout.n_heads == 1:
            return value + advantage - advantage.mean(dim=-1, keepdim=True)
        advantage = advantage.unflatten(-1, (self.layout.n_heads, self.layout.width))
        used = th.ones(1, 1).to(advantage) if self.layout.used is None else self.layout.used.to(advantage)
        used = used.expand(self.layout.n_heads, self.layout.width)
        mean = (advantage * used).sum(dim=-1, keepdim=True) / used.sum(dim=-1, keepdim=True)
        return (value.unsqueeze(-1) + advantage - mean).flatten(start_dim=-2)


class QNetwork(DQNQNetwork):
    """
    SB3's action-value network, with a dueling head as an option.

    :param layout: the heads of actions
    :param dueling: whether the last layer of ``net_arch`` and the output are split in two streams (:class:`DuelingHead`)
    """

    def __init__(self, *args: Any, layout: ActionLayout, dueling: bool = False, **kwargs: Any) -> None:
        # One output for each value: SB3's network asks the action space for their number
        super().__init__(*args, **{**kwargs, "action_space": spaces.Discrete(layout.n_values)})
        self.layout = layout
        self.dueling = dueling
        if dueling:
            trunk, hidden_units = self.net_arch[:-1], self.net_arch[-1:]
            head_dim = trunk[-1] if trunk else self.features_dim
            self.q_net = nn.Sequential(
                *create_mlp(self.features_dim, -1, trunk, self.activation_fn),
                DuelingHead(head_dim, hidden_units, layout, self.activation_fn),
            )
        # Observations that are their own features need neither preprocessing nor flattening
        self.reads_vectors = type(self.features_extractor) is FlattenExtractor and is_vector_space(self.observation_space)
        self.mlp_layers = relu_mlp_layers(self.q_net)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Action values.

        :param obs: observations
        :return: ``(batch_size, n_actions)``; of all heads, ``(batch_size, n_heads * width)``
        """
        if self.reads_vectors:
            assert isinstance(obs, th.Tensor)  # for mypy
            features = obs if obs.dtype == th.float32 else obs.to(next(self.parameters()).dtype)
        else:
            features = self.extract_features(obs, self.features_extractor)
        if self.mlp_layers is None or any(layer._forward_hooks for layer in self.mlp_layers):
            return self.q_net(features)
        return relu_mlp(features, self.mlp_layers)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "layout": self.layout, "dueling": self.dueling}


class QNetworks(BasePolicy):
    """
    Independent networks over the actions, extractors included.

    :param networks: the networks
    """

    def __init__(self, networks: list[QNetwork]) -> None:
        super().__init__(networks[0].observation_space, networks[0].action_space)
        self.networks = nn.ModuleList(networks)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Values of all networks.

        :param obs: observations
        :return: ``(n_networks, batch_size, n_actions)``
        """
        return self.networks_of(obs, slice(None))

    def networks_of(self, obs: PyTorchObs, which: slice) -> th.Tensor:
        """
        Values of some of the networks.

        :param obs: observations
        :param which: which of them
        :return: ``(n_selected, batch_size, n_actions)``
        """
        return th.stack([network(obs) for network in self.networks[which]])

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self(observation).amin(dim=0).argmax(dim=1)


class QPolicy(DQNPolicy):
    """
    Action-value network and its target for flat observations; its parameters are those of SB3's DQN
    policy, and

    :param features_extractor_class: ``None`` chooses the extractor by the observation space
    :param dueling: whether to split the network's head in a value and an advantage stream
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        dueling: bool = False,
    ) -> None:
        self.dueling = dueling
        self.layout = ActionLayout(action_space)
        if features_extractor_class is None:
            features_extractor_class = self.default_features_extractor(observation_space)
        if net_arch is None:
            # The image extractors end with a hidden layer of their own
            net_arch = [] if features_extractor_class in (NatureCNN, SmallImageCNN) else [64, 64]
        super().__init__(
            observation_space,
            action_space,  # type: ignore[arg-type]
            lr_schedule,
            net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
            optimizer_class,
            optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        ours = (BasePolicy, FlattenExtractor, NatureCNN, SmallImageCNN, ImageCombinedExtractor, DuelingHead)
        # Whether anything, such as batch norm, dropout or a module that we do not know, depends on the mode
        self.has_modes = not all(
            type(module) in MODELESS_MODULES or isinstance(module, ours) for module in self.q_net.modules()
        )

    def set_training_mode(self, mode: bool) -> None:
        """
        Switch between training and evaluation mode, where anything depends on it (batch norm and dropout do).

        :param mode: True for training mode
        """
        if self.has_modes:
            super().set_training_mode(mode)
        self.__dict__["training"] = mode  # sooner than through the module's __setattr__

    @staticmethod
    def default_features_extractor(observation_space: spaces.Space) -> type[BaseFeaturesExtractor]:
        """
        The features extractor where the user names none.

        :param observation_space: observation space of the environment
        :raises ValueError: if no policy of this name can read it
        """
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(f"MlpPolicy cannot read observation_space={observation_space}: use MultiInputPolicy")
        return FlattenExtractor

    def make_q_net(self) -> QNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return QNetwork(**net_args, layout=self.layout, dueling=self.dueling).to(self.device)

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        Action values.

        :param obs: observations
        :return: ``(batch_size, n_actions)``; of all heads, ``(batch_size, n_heads * width)``
        """
        return self.q_net(obs)

    def acting_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        What the agent acts on: the greedy action is where they are largest, the policy their softmax.

        :param obs: observations
        :return: as :meth:`q_values`, which they are where there is no other network for the policy
        """
        return self.q_values(obs)

    def _predict(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        values = self.acting_values(obs)
        return greedy_actions(self.layout.rows(values), self.layout.mask_rows(None, len(values), values.device))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "dueling": self.dueling}


class CnnQPolicy(QPolicy):
    """:class:`QPolicy` for images, large (NatureCNN) or small (:class:`SmallImageCNN`)."""

    @staticmethod
    def default_features_extractor(observation_space: spaces.Space) -> type[BaseFeaturesExtractor]:
        return image_extractor(observation_space)


class MultiInputQPolicy(QPolicy):
    """:class:`QPolicy` for Dict observations."""

    @staticmethod
    def default_features_extractor(observation_space: spaces.Space) -> type[BaseFeaturesExtractor]:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"MultiInputPolicy reads Dict observations, not {observation_space=!s}: use MlpPolicy")
        return ImageCombinedExtractor


class TwinQPolicy(QPolicy):
    """:class:`QPolicy` with two networks; the agent acts on the minimum of their action values."""

    n_networks: ClassVar[int] = 2
    q_net: QNetworks  # type: ignore[assignment]
    q_net_target: QNetworks  # type: ignore[assignment]

    def make_q_net(self) -> QNetworks:  # type: ignore[override]
        return QNetworks([super(TwinQPolicy, self).make_q_net() for _ in range(self.n_networks)]).to(self.device)

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        return self.q_net(obs).amin(dim=0)


class TwinCnnQPolicy(TwinQPolicy, CnnQPolicy):
    """:class:`TwinQPolicy` for images."""


class TwinMultiInputQPolicy(TwinQPolicy, MultiInputQPolicy):
    """:class:`TwinQPolicy` for Dict observations."""


class SumQPolicy(TwinQPolicy):
    """:class:`QPolicy` with two networks; the agent acts on their sum."""

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        return self.q_net(obs).sum(dim=0)


class SumCnnQPolicy(SumQPolicy, CnnQPolicy):
    """:class:`SumQPolicy` for images."""


class SumMultiInputQPolicy(SumQPolicy, MultiInputQPolicy):
    """:class:`SumQPolicy` for Dict observations."""


class ActorQPolicy(TwinQPolicy):
    """:class:`QPolicy` with a second network, which the agent acts on."""

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        return self.q_net(obs)[:-1].amin(dim=0)

    def acting_values(self, obs: PyTorchObs) -> th.Tensor:
        return self.q_net.networks[-1](obs)


class ActorCnnQPolicy(ActorQPolicy, CnnQPolicy):
    """:class:`ActorQPolicy` for images."""


class ActorMultiInputQPolicy(ActorQPolicy, MultiInputQPolicy):
    """:class:`ActorQPolicy` for Dict observations."""


class TwinActorQPolicy(ActorQPolicy):
    """:class:`ActorQPolicy` with two networks for the action values, of which the smaller count, beside the one it acts on."""

    n_networks = 3


class TwinActorCnnQPolicy(TwinActorQPolicy, CnnQPolicy):
    """:class:`TwinActorQPolicy` for images."""


class TwinActorMultiInputQPolicy(TwinActorQPolicy, MultiInputQPolicy):
    """:class:`TwinActorQPolicy` for Dict observations."""
