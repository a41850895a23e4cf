"""
The algorithms in rl-zoo3: ``rl-zoo3 train --algo mdqn --env CartPole-v1``, or, in a script that uses rl_zoo3 itself::

    import sb3_softq.zoo

    sb3_softq.zoo.register()

rl_zoo3 is imported by ``register()`` and not before: without the extra ``sb3-softq[zoo]`` the rest of the package works.
"""

from sb3_softq.zoo.registration import default_config, register

__all__ = ["default_config", "register"]
