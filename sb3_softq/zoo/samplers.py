"""
Search spaces for rl_zoo3's ``-optimize``.

The value-based algorithms share upstream's space for DQN, the actor-critics that for SAC; each adds the pieces that are its
own in ``SAMPLERS``. A sampled
value gets its final form in the converter alone, so that ``--trial-id`` finds in the study exactly what was trained.
"""

from collections.abc import Callable
from typing import Any

from optuna import Trial
from rl_zoo3.hyperparams_opt import convert_offpolicy_params, sample_dqn_params, sample_sac_params

Sampler = Callable[[Trial, int, int, dict[str, Any]], dict[str, Any]]


def temperature(trial: Trial) -> None:
    trial.suggest_float("temperature", 0.001, 1.0, log=True)


def learned_temperature(trial: Trial) -> None:
    trial.suggest_float("auto_temperature", 0.01, 1.0, log=True)
    trial.suggest_float("auto_target_entropy", 0.02, 0.9, log=True)


def munchausen(trial: Trial) -> None:
    trial.suggest_float("munchausen_alpha", 0.0, 0.99)
    trial.suggest_float("munchausen_clip", -10.0, -0.1)


def conservative(trial: Trial) -> None:
    trial.suggest_float("munchausen_alpha", 0.0, 0.99)


def programming(trial: Trial) -> None:
    trial.suggest_categorical("operator", ["boltzmann", "logsumexp"])
    trial.suggest_float("gap_clip", -10.0, -0.1)


def momentum(trial: Trial) -> None:
    # The weight of the new action values, over two orders of magnitude
    trial.suggest_float("one_minus_momentum", 0.01, 1.0, log=True)


def mirror_descent(trial: Trial) -> None:
    trial.suggest_float("kl_coef", 0.001, 1.0, log=True)
    trial.suggest_float("ent_coef", 0.001, 1.0, log=True)
    trial.suggest_categorical("greedy_step", ["direct", "indirect", "dual_averaging"])
    trial.suggest_categorical("regularised_evaluation", [False, True])


def quantiles(trial: Trial) -> None:
    # Not by its own name, which upstream takes for an argument of the policy
    trial.suggest_categorical("quantiles", [8, 32, 64])


def learned_ent_coef(trial: Trial) -> None:
    trial.suggest_float("auto_ent_coef", 0.01, 1.0, log=True)
    trial.suggest_float("auto_target_entropy", 0.02, 0.9, log=True)


def discrete_sac(trial: Trial) -> None:
    trial.suggest_categorical("entropy_penalty", [0.0, 0.5])
    trial.suggest_categorical("average_q", [False, True])
    trial.suggest_float("munchausen_alpha", 0.0, 0.99)


def exploration(trial: Trial) -> None:
    trial.suggest_categorical("exploration", ["boltzmann", "eps_greedy", "boltzmann_eps"])


def double_q(trial: Trial) -> None:
    trial.suggest_categorical("double_q", [False, True])


def convert_value_based_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn the parameters of a trial into arguments of a constructor.

    :param sampled_params: What the sampler suggested, as the study stores it
    :return: Arguments of the algorithm
    """
    hyperparams = convert_offpolicy_params(sampled_params)
    # `target_update_interval` is searched over: the interval of full copies, also where the settings file has Polyak updates
    hyperparams["tau"] = 1.0
    if "quantiles" in hyperparams:
        hyperparams["n_quantiles"] = hyperparams.pop("quantiles")
    if "one_minus_momentum" in hyperparams:
        hyperparams["momentum"] = 1 - hyperparams.pop("one_minus_momentum")
    for name in ("temperature", "ent_coef", "target_entropy"):
        if f"auto_{name}" in hyperparams:
            hyperparams[name] = f"auto_{hyperparams.pop(f'auto_{name}')}"
    return hyperparams


def value_based_sampler(*own_parameters: Callable[[Trial], None]) -> Sampler:
    """
    :param own_parameters: What the algorithm has beyond DQN, each a function that suggests values to a trial
    :return: Sampler for rl_zoo3
    """

    def sample(trial: Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        # The settings of a hindsight buffer stay as the settings file has them
        sample_dqn_params(trial, n_actions, n_envs, {**additional_args, "using_her_replay_buffer": False})
        for suggest in own_parameters:
            suggest(trial)
        return convert_value_based_params(trial.params)

    return sample


def munchausen_bound(trial: Trial) -> None:
    trial.suggest_float("munchausen_alpha", 0.0, 0.99)
    trial.suggest_float("munchausen_bound", 0.1, 10.0, log=True)


def soft_q_learning(trial: Trial) -> None:
    trial.suggest_float("temperature", 0.003, 3.0, log=True)
    trial.suggest_categorical("value_proposal", ["uniform", "policy"])


def trust_region(trial: Trial) -> None:
    # The bounds, not the multipliers, which are learned from these
    trial.suggest_float("epsilon_mean", 1e-3, 0.3, log=True)
    trial.suggest_float("epsilon_covariance", 1e-5, 1e-2, log=True)
    # 1 is for averages, whose coefficient is sampled as SAC's; the others for copies
    trial.suggest_categorical("target_update_interval", [1, 25, 50, 100, 200, 400])


def e_step(trial: Trial) -> None:
    trial.suggest_float("epsilon", 0.01, 1.0, log=True)


def weighting(trial: Trial) -> None:
    trial.suggest_categorical("weighting", ["rank", "exponential", "identity"])


def convert_actor_critic_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn the parameters of a trial into arguments of a constructor.

    :param sampled_params: What the sampler suggested, as the study stores it
    :return: Arguments of the algorithm
    """
    hyperparams = convert_offpolicy_params(sampled_params)
    if "munchausen_bound" in hyperparams:
        bound = hyperparams.pop("munchausen_bound")
        hyperparams["munchausen_clip"] = (-bound, bound)
    if hyperparams.get("target_update_interval", 1) > 1:
        hyperparams["tau"] = 1.0
    return hyperparams


def actor_critic_sampler(*own_parameters: Callable[[Trial], None]) -> Sampler:
    """
    :param own_parameters: What the algorithm has beyond SAC, each a function that suggests values to a trial
    :return: Sampler for rl_zoo3
    """

    def sample(trial: Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        # The settings of a hindsight buffer stay as the settings file has them
        sample_sac_params(trial, n_actions, n_envs, {**additional_args, "using_her_replay_buffer": False})
        for suggest in own_parameters:
            suggest(trial)
        return convert_actor_critic_params(trial.params)

    return sample


SAMPLERS: dict[str, Sampler] = {
    "softdqn": value_based_sampler(temperature, exploration, double_q),
    "sqn": value_based_sampler(learned_temperature, exploration),
    "mdqn": value_based_sampler(temperature, munchausen, exploration),
    "miqn": value_based_sampler(temperature, munchausen, quantiles, exploration),
    "dpp": value_based_sampler(temperature, programming, exploration),
    "cvi": value_based_sampler(temperature, conservative, exploration),
    "modqn": value_based_sampler(temperature, momentum, exploration),
    "mddqn": value_based_sampler(mirror_descent, exploration),
    "sacd": value_based_sampler(learned_ent_coef, discrete_sac),
}
ACTOR_CRITIC_SAMPLERS: dict[str, Sampler] = {
    "msac": actor_critic_sampler(munchausen_bound),
    "sql": actor_critic_sampler(soft_q_learning),
    "mpo": actor_critic_sampler(trust_region, e_step),
    "rerpi": actor_critic_sampler(trust_region, e_step, weighting),
}
CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(SAMPLERS, convert_value_based_params),
    **dict.fromkeys(ACTOR_CRITIC_SAMPLERS, convert_actor_critic_params),
}
SAMPLERS.update(ACTOR_CRITIC_SAMPLERS)
