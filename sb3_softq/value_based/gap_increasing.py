"""What the algorithms share that widen the gap between the best action and the others."""

from collections.abc import Callable

import torch as th

from sb3_softq import operators
from sb3_softq.checks import check_number
from sb3_softq.value_based.base import ValueBasedAlgorithm

Operator = Callable[[th.Tensor, operators.Temperature, th.Tensor | None], th.Tensor]


def check_munchausen(munchausen_alpha: float, munchausen_clip: float) -> None:
    """
    Raise unless the parameters of a Munchausen term can be used.

    :param munchausen_alpha: its weight
    :param munchausen_clip: its lower bound before it is weighted
    """
    check_number("munchausen_alpha", munchausen_alpha, 0, 1)
    check_number("munchausen_clip", munchausen_clip, maximum=0, finite=False)


def munchausen_bonus(
    gap: th.Tensor, munchausen_alpha: float, munchausen_clip: float
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    ``munchausen_alpha * max(gap, munchausen_clip)``, and which gaps the clip bounds, to log their share.

    :param gap: a scaled log-policy, or another distance of an action from its state's value
    :param munchausen_alpha: its weight
    :param munchausen_clip: its lower bound before it is weighted
    """
    return munchausen_alpha * gap.clamp(min=munchausen_clip), {"munchausen_clip_fraction": gap <= munchausen_clip}


class GapIncreasingAlgorithm(ValueBasedAlgorithm):
    """
    Base of the algorithms whose bonus is the distance of an action from the value of its state,

        ``alpha * max(q(s, a) - V(s), clip)``,

    with the V of the target, everything of the target network.
    """

    munchausen_alpha: float
    munchausen_clip: float

    @property
    def _operator(self) -> Operator:
        """The operator V."""
        return operators.soft_value

    @property
    def _has_bonus(self) -> bool:
        return True

    def _value(self, estimates: tuple[th.Tensor, ...], mask: th.Tensor | None) -> th.Tensor:
        return self._operator(estimates[0], self.current_temperature, mask)

    def _bonus(
        self, estimates: tuple[th.Tensor, ...], actions: th.Tensor, mask: th.Tensor | None
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        temperature = self.current_temperature
        gap = self._joint(operators.gap_bonus(estimates[0], actions, temperature, mask=mask, value=self._operator))
        return munchausen_bonus(gap, self.munchausen_alpha, self.munchausen_clip)
