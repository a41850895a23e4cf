"""Actor-critic algorithms, for continuous actions and, where the class says so, for discrete ones."""

from sb3_softq.actor_critic.mpo import MPO
from sb3_softq.actor_critic.msac import MunchausenSAC
from sb3_softq.actor_critic.rerpi import RERPI
from sb3_softq.actor_critic.sql import SoftQLearning

__all__ = ["MPO", "RERPI", "MunchausenSAC", "SoftQLearning"]
