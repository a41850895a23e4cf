"""What rl_zoo3 has to know of our algorithms. It has no plugin interface, so its tables and one class are changed in place."""

import functools
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import WrapperSpec

import sb3_softq
from sb3_softq import ALGOS
from sb3_softq.actions import has_action_masks
from sb3_softq.value_based.base import ValueBasedAlgorithm


def default_config(algo: str) -> Path:
    """
    The file with the settings of an algorithm, one section for each environment.

    :param algo: Name of the algorithm in the zoo, e.g. ``"mdqn"``
    :return: Path of its YAML file, in the installed package or beside it in an editable checkout
    """
    if algo not in ALGOS:
        raise ValueError(f"{algo!r} is no algorithm of sb3_softq, which has {', '.join(ALGOS)}")
    package = Path(sb3_softq.__file__).parent
    candidates = [folder / "hyperparams" / f"{algo}.yml" for folder in (package, package.parent)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"Neither {candidates[0]} nor {candidates[1]} is there: reinstall sb3_softq")


@functools.cache
def register() -> None:
    """
    Make rl_zoo3 know our algorithms, their settings and their search spaces, and gymnasium the MinAtar games and the
    environments of SB3 and sb3-contrib with MultiDiscrete actions and with action masks.

    Nothing happens the second time. Upstream's own algorithms stay as they are.
    """
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS as ZOO_ALGOS

    from sb3_softq.zoo.samplers import CONVERTERS, SAMPLERS

    ZOO_ALGOS.update(ALGOS)
    HYPERPARAMS_SAMPLER.update(SAMPLERS)
    HYPERPARAMS_CONVERTER.update(CONVERTERS)
    _extend_experiment_manager()
    _evaluate_with_masks()
    _register_minatar()
    _register_identity_environments()


def _extend_experiment_manager() -> None:
    """For our algorithms: default settings, help where there are none, and no trained weights lost when training fails."""
    from rl_zoo3.exp_manager import ExperimentManager

    upstream_init = ExperimentManager.__init__
    upstream_read_hyperparameters = ExperimentManager.read_hyperparameters
    upstream_learn = ExperimentManager.learn
    signature = inspect.signature(upstream_init)

    @functools.wraps(upstream_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        if bound.arguments["algo"] in ALGOS and not bound.arguments.get("config"):
            bound.arguments["config"] = str(default_config(bound.arguments["algo"]))
        upstream_init(*bound.args, **bound.kwargs)

    @functools.wraps(upstream_read_hyperparameters)
    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo in ALGOS and self.config == str(default_config(self.algo)):
            _check_settings_exist(self.config, self.env_name.gym_id, self._is_atari)
        return upstream_read_hyperparameters(self)

    @functools.wraps(upstream_learn)
    def learn(self: Any, model: Any) -> None:
        try:
            upstream_learn(self, model)
        except Exception as error:
            if self.algo in ALGOS:
                print(f"{type(error).__name__} after {model.num_timesteps} steps: the model is saved as it is")
                self.save_trained_model(model)
            raise

    ExperimentManager.__init__ = init  # type: ignore[method-assign]
    ExperimentManager.read_hyperparameters = read_hyperparameters  # type: ignore[method-assign]
    ExperimentManager.learn = learn  # type: ignore[method-assign]


def _evaluate_with_masks() -> None:
    """Evaluations during a training ask the environment for its action masks, where it has them."""
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked_policy
    from stable_baselines3.common import callbacks

    upstream_evaluate_policy = callbacks.evaluate_policy

    @functools.wraps(upstream_evaluate_policy)
    def evaluate_policy(model: Any, env: Any, *args: Any, **kwargs: Any) -> Any:
        masked = isinstance(model, ValueBasedAlgorithm) and has_action_masks(env)
        return (evaluate_masked_policy if masked else upstream_evaluate_policy)(model, env, *args, **kwargs)

    callbacks.evaluate_policy = evaluate_policy


def _check_settings_exist(config: str, env_id: str, is_atari: bool) -> None:
    import yaml

    sections = yaml.safe_load(Path(config).read_text())
    if env_id not in sections and not (is_atari and "atari" in sections):
        raise ValueError(
            f"No settings for {env_id} in {config}, which has {', '.join(sections)}. Write a section `{env_id}:` (at least "
            "`n_timesteps: 100000` and `policy: MlpPolicy`) into a YAML file and pass it with `--conf-file FILE.yml`; "
            "single settings are then changed on the command line with `--hyperparams key:value`."
        )


def _register_minatar() -> None:
    """What ``minatar.gym.register_envs()`` does, without the second that importing minatar adds to every command."""
    if importlib.util.find_spec("minatar") is None or "MinAtar/Breakout-v1" in gym.registry:
        return
    for game in ("asterix", "breakout", "freeway", "seaquest", "space_invaders"):
        for version, minimal in enumerate((False, True)):
            gym.register(
                id=f"MinAtar/{game.title().replace('_', '')}-v{version}",
                entry_point="minatar.gym:BaseEnv",
                kwargs={"game": game, "use_minimal_action_set": minimal},
            )


def _register_identity_environments() -> None:
    """Environments that come with SB3 and sb3-contrib without a name, for a first try of what they are about."""
    if "IdentityMultiDiscrete-v0" not in gym.registry:
        gym.register("IdentityMultiDiscrete-v0", "stable_baselines3.common.envs:IdentityEnvMultiDiscrete", kwargs={"dim": 5})
        # Its episodes end by a time limit alone, and the zoo makes the VecEnv
        wrapper = WrapperSpec("TerminalActionMasks", "sb3_softq.actions:TerminalActionMasks", kwargs={})
        gym.register(
            "InvalidActionDiscrete-v0",
            "sb3_contrib.common.envs:InvalidActionEnvDiscrete",
            kwargs={"dim": 20, "n_invalid_actions": 10},
            additional_wrappers=(wrapper,),
        )
