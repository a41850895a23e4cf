"""Actor-critic algorithms, for continuous actions and, where the class says so, for discrete ones."""

from sb3_softq.actor_critic.msac import MunchausenSAC

__all__ = ["MunchausenSAC"]
