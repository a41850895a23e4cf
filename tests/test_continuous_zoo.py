"""rl-zoo3 with the actor-critic algorithms."""

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from continuous import ACTOR_CRITIC

from sb3_softq import ALGOS
from sb3_softq.zoo import default_config, register

optuna = pytest.importorskip("optuna")
pytest.importorskip("rl_zoo3")
register()

from rl_zoo3.exp_manager import ExperimentManager  # noqa: E402
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER  # noqa: E402

CLASSIC = ["Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
MUJOCO = [
    f"{name}-v5"
    for name in "HalfCheetah Ant Hopper Walker2d Humanoid HumanoidStandup Swimmer InvertedPendulum InvertedDoublePendulum "
    "Reacher Pusher".split()
]
# What the zoo's settings files hold beside arguments of the constructor
ZOO_KEYS = {"n_timesteps", "noise_type", "noise_std"}


@pytest.mark.parametrize("algo", ACTOR_CRITIC)
def test_settings_name_arguments_of_the_constructor(algo):
    sections = yaml.safe_load(default_config(algo).read_text())
    assert set(sections) >= {*CLASSIC, *MUJOCO}
    arguments = inspect.signature(ALGOS[algo]).parameters.keys()
    for env_id, settings in sections.items():
        assert settings.keys() <= arguments | ZOO_KEYS, env_id
        assert settings.keys() >= {"n_timesteps", "policy"}, env_id


def test_settings_of_munchausen_sac_are_the_zoos_of_sac():
    # ent_coef 'auto' and buffer_size of a million are the constructor's, too
    manager = ExperimentManager(argparse.Namespace(), "sac", "Pendulum-v1", "", verbose=0)
    zoo = yaml.safe_load(Path(manager.config).read_text())
    ours = yaml.safe_load(default_config("msac").read_text())
    defaults = {name: parameter.default for name, parameter in inspect.signature(ALGOS["msac"]).parameters.items()}
    for env_id in CLASSIC:
        assert {**defaults, **zoo[env_id]} == {**defaults, **ours[env_id]}, env_id


@pytest.mark.parametrize("algo", ACTOR_CRITIC)
@pytest.mark.parametrize("env_id", [*CLASSIC, "HalfCheetah-v5", "Humanoid-v5"])
def test_settings_build_a_model(algo, env_id, tmp_path):
    if env_id.endswith("v5"):
        pytest.importorskip("mujoco")
    elif env_id not in ("Pendulum-v1", "MountainCarContinuous-v0"):
        pytest.importorskip("Box2D")
    manager = ExperimentManager(argparse.Namespace(), algo, env_id, str(tmp_path), verbose=0, eval_freq=-1)
    model, settings = manager.setup_experiment()
    for name in ("gamma", "batch_size", "temperature", "tau", "n_steps"):
        if name in settings:
            assert getattr(model, name) == settings[name]


OWN_PARAMETERS = {
    "msac": {"munchausen_alpha", "munchausen_clip"},
    "sql": {"temperature", "value_proposal"},
    "mpo": {"epsilon", "epsilon_mean", "epsilon_covariance", "target_update_interval"},
    "rerpi": {"epsilon", "epsilon_mean", "epsilon_covariance", "target_update_interval", "weighting"},
}


@pytest.mark.parametrize("algo", ACTOR_CRITIC)
def test_sampled_parameters_are_accepted_and_found_again(algo):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        sampled = HYPERPARAMS_SAMPLER[algo](trial, 0, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert sampled.keys() > OWN_PARAMETERS[algo] | {"learning_rate", "gamma", "tau"}
        model = ALGOS[algo]("MlpPolicy", "Pendulum-v1", **sampled)
        assert all(getattr(model, name) == sampled[name] for name in OWN_PARAMETERS[algo])
        if "target_update_interval" in OWN_PARAMETERS[algo]:
            assert (model.tau == 1.0) == (model.target_update_interval > 1)  # copies, or averages
        study.tell(trial, 0.0)
        assert HYPERPARAMS_CONVERTER[algo](study.trials[-1].params) == sampled


@pytest.mark.parametrize("algo", ACTOR_CRITIC)
def test_train_and_enjoy(algo, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", "sb3_softq", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    train = ["train", "--algo", algo, "--env", "Pendulum-v1", "-n", "250", "--eval-freq", "-1", "--seed", "1"]
    run(*train, "-params", "learning_starts:200")
    agent = tmp_path / "logs" / algo / "Pendulum-v1_1" / "Pendulum-v1.zip"
    assert ALGOS[algo].load(agent)._n_updates > 0
    assert "Mean reward" in run("enjoy", "--algo", algo, "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "250")
    # Training goes on with the settings of the file, which are arguments of load()
    assert "Loading pretrained agent" in run(*train, "-i", str(agent))
