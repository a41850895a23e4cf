"""
rl-zoo3 with our algorithms. Its commands are run as a user runs them, as subprocesses in an empty folder; what needs no
process of its own is tested in this one.
"""

import argparse
import inspect
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from helpers import VALUE_BASED

import sb3_softq
from sb3_softq import ALGOS
from sb3_softq.zoo import cli, default_config, register

optuna = pytest.importorskip("optuna")
pytest.importorskip("rl_zoo3")
register()

from rl_zoo3.exp_manager import ExperimentManager  # noqa: E402
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER  # noqa: E402
from rl_zoo3.utils import ALGOS as ZOO_ALGOS  # noqa: E402

MODULE = [sys.executable, "-m", "sb3_softq"]
SCRIPTS = [[str(path)] for name in ("rl-zoo3", "sb3-softq") if (path := Path(sys.executable).with_name(name)).exists()]
ENVIRONMENT = {
    **os.environ,
    "MPLBACKEND": "Agg",
    "SDL_VIDEODRIVER": "dummy",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
MINATAR_GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]
# With MultiDiscrete actions, and with masks that exclude half of the actions
IDENTITY_ENVIRONMENTS = ["IdentityMultiDiscrete-v0", "InvalidActionDiscrete-v0"]
# What the zoo's settings files hold beside arguments of the constructor
ZOO_KEYS = {"n_timesteps", "n_envs", "env_wrapper", "vec_env_wrapper", "frame_stack", "normalize", "callback", "env_kwargs"}


def run(*arguments: str, folder: Path, launcher: list[str] = MODULE, returncode: int = 0) -> str:
    """Run a command in a folder, check its exit code, and return what it printed."""
    result = subprocess.run(
        [*launcher, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == returncode, result.stdout[-4000:]
    return result.stdout


EARLY_UPDATES = {"learning_starts": 20, "train_freq": 4, "gradient_steps": 1}


def train(
    algo: str, *arguments: str, params: dict[str, Any] = EARLY_UPDATES, env: str = "CartPole-v1", n: int = 150, **kwargs: Any
) -> str:
    """A short training run, with updates from the start and without evaluation unless asked for."""
    defaults = ["--eval-freq", "-1", "--seed", "1", "-params", *(f"{name}:{value}" for name, value in params.items())]
    return run("train", "--algo", algo, "--env", env, "-n", str(n), *defaults, *arguments, **kwargs)


def optimize(algo: str, *arguments: str, folder: Path) -> str:
    search = ["--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--pruner", "none", "--no-optim-plots"]
    return run("train", "--algo", algo, "-optimize", "-n", "100", "--seed", "1", *search, *arguments, folder=folder)


def load(algo: str, path: Path) -> Any:
    return ALGOS[algo].load(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an agent was trained, with evaluations and checkpoints. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    output = train("mdqn", "--eval-freq", "50", "--eval-episodes", "2", "--save-freq", "100", folder=folder)
    assert str(default_config("mdqn")) in output
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "logs", tmp_path / "logs")
    return tmp_path


def first_run(folder: Path) -> Path:
    return folder / "logs" / "mdqn" / "CartPole-v1_1"


# ------------------------------------------------------------------ commands, as subprocesses


def test_train_saves_the_agent_with_its_settings(trained: Path) -> None:
    model = load("mdqn", first_run(trained) / "CartPole-v1.zip")
    assert model.num_timesteps >= 150 and model._n_updates > 0
    assert (first_run(trained) / "best_model.zip").is_file()
    assert (first_run(trained) / "rl_model_100_steps.zip").is_file()
    saved = yaml.unsafe_load((first_run(trained) / "CartPole-v1" / "config.yml").read_text())
    in_the_file = yaml.safe_load(default_config("mdqn").read_text())["CartPole-v1"]
    assert dict(saved) == {**in_the_file, **EARLY_UPDATES}


def test_enjoy(folder: Path) -> None:
    output = run("enjoy", "--algo", "mdqn", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", "200", folder=folder)
    assert "Mean reward" in output
    # The window of the environment, drawn to nowhere
    run("enjoy", "--algo", "mdqn", "-f", "logs", "--load-checkpoint", "100", "-n", "5", folder=folder)


def test_continue_training_then_plots(folder: Path) -> None:
    # No update happens before the end: what is saved has the weights that were loaded
    agent = first_run(folder) / "CartPole-v1.zip"
    arguments = ["-i", str(agent), "--eval-freq", "50", "--eval-episodes", "2"]
    output = train("mdqn", *arguments, params={**EARLY_UPDATES, "learning_starts": 1000, "temperature": 0.07}, folder=folder)
    assert "Loading pretrained agent" in output
    before = load("mdqn", agent)
    after = load("mdqn", folder / "logs" / "mdqn" / "CartPole-v1_2" / "CartPole-v1.zip")
    assert after.temperature == 0.07
    assert after._n_updates == before._n_updates > 0
    for old, new in zip(before.q_net.parameters(), after.q_net.parameters(), strict=True):
        assert (old == new).all()

    # Two runs are what plot_from_file needs
    run("plot_train", "-a", "mdqn", "-e", "CartPole-v1", "-f", "logs", "-w", "3", folder=folder)
    table = run("all_plots", "-a", "mdqn", "-e", "CartPole-v1", "-f", "logs", "-o", "results", folder=folder)
    assert "MDQN" in table and (folder / "results.pkl").is_file()
    run("plot_from_file", "-i", "results.pkl", "-l", "MDQN", "--boxplot", "-o", "plot.png", "--format", "png", folder=folder)
    assert (folder / "plot.png").is_file()


def test_record_video(folder: Path) -> None:
    run("record_video", "--algo", "mdqn", "--env", "CartPole-v1", "-f", "logs", "-n", "10", folder=folder)
    assert list((first_run(folder) / "videos").glob("final-model-mdqn-*.mp4"))


@pytest.mark.parametrize("algo, env", [("softdqn", "MinAtar/Breakout-v1"), ("sqn", "CartPole-v1")])
def test_train_in_subprocesses(algo: str, env: str, tmp_path: Path) -> None:
    if "MinAtar" in env:
        pytest.importorskip("minatar")
    params = {**EARLY_UPDATES, "n_envs": 2}
    assert "Using 2 environments" in train(algo, "--vec-env", "subproc", params=params, env=env, folder=tmp_path)
    name = env.replace("/", "-")
    model = load(algo, tmp_path / "logs" / algo / f"{name}_1" / f"{name}.zip")
    assert model.n_envs == 2 and model._n_updates > 0


@pytest.mark.parametrize("algo, env", list(zip(["miqn", "cvi"], IDENTITY_ENVIRONMENTS, strict=True)))
def test_train_with_several_heads_and_with_masks(algo: str, env: str, tmp_path: Path) -> None:
    # An action that its mask excludes is an error of the environment, in the evaluations too
    train(algo, "--eval-freq", "50", "--eval-episodes", "2", env=env, folder=tmp_path)
    evaluations = np.load(tmp_path / "logs" / algo / f"{env}_1" / "evaluations.npz")
    assert evaluations["results"].shape == (3, 2)
    assert load(algo, tmp_path / "logs" / algo / f"{env}_1" / f"{env}.zip")._n_updates > 0


def test_masked_environment_tells_its_last_mask() -> None:
    env = gym.make("InvalidActionDiscrete-v0")
    env.reset(seed=0)
    truncated = False
    while not truncated:
        masks = np.array(env.get_wrapper_attr("action_masks")())
        *_, truncated, info = env.step(masks.argmax())
    last = env.get_wrapper_attr("action_masks")()
    assert list(info["terminal_action_masks"]) == list(last) != list(masks)


def test_optimize_in_memory(tmp_path: Path) -> None:
    output = optimize("mdqn", folder=tmp_path)
    assert "Number of finished trials:  2" in output and "munchausen_alpha:" in output
    assert list((tmp_path / "logs" / "mdqn").glob("report_*.csv"))


@pytest.mark.parametrize("algo, storage", [("sqn", "sqlite:///study.db"), ("softdqn", "study.log")])
def test_optimize_with_storage_then_train_a_trial(algo: str, storage: str, tmp_path: Path) -> None:
    stored = ["--storage", storage, "--study-name", "study"]
    optimize(algo, *stored, folder=tmp_path)
    assert "Loading from Optuna study" in run(
        "train", "--algo", algo, "-n", "50", "--eval-freq", "-1", *stored, "--trial-id", "1", folder=tmp_path
    )

    if storage.endswith(".log"):
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / storage))
        study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    else:
        study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/study.db")
    assert len(study.trials) == 2
    of_the_trial = HYPERPARAMS_CONVERTER[algo](study.trials[1].params)
    # Search and retraining number their folders together
    (config,) = (tmp_path / "logs" / algo).glob("CartPole-v1_*/CartPole-v1/config.yml")
    assert of_the_trial.items() <= yaml.unsafe_load(config.read_text()).items()


def test_upstream_algorithms_still_train(tmp_path: Path) -> None:
    train("dqn", "--verbose", "0", launcher=SCRIPTS[0] if SCRIPTS else MODULE, folder=tmp_path)
    assert (tmp_path / "logs" / "dqn" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()


@pytest.mark.parametrize("launcher", [MODULE, *SCRIPTS], ids=lambda launcher: Path(launcher[0]).name)
def test_command_without_arguments(launcher: list[str], tmp_path: Path) -> None:
    output = run(folder=tmp_path, launcher=launcher, returncode=2)
    program = "python -m sb3_softq" if launcher is MODULE else Path(launcher[0]).name
    assert "record_video" in output and f"{program} train --algo mdqn" in output


def test_interrupted_training_is_saved(tmp_path: Path) -> None:
    command = [*MODULE, "train", "--algo", "mdqn", "-n", "1000000", "--eval-freq", "-1", "--log-interval", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        # As in a terminal, also where the tests themselves run in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert any("total_timesteps" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "Saving to" in output
    assert 0 < load("mdqn", first_run(tmp_path) / "CartPole-v1.zip").num_timesteps < 1000000


def test_diverged_training_is_saved(tmp_path: Path) -> None:
    (tmp_path / "broken_env.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class BrokenEnv(CartPoleEnv):\n"
        "    steps = 0\n"
        "    def step(self, action):\n"
        "        self.steps += 1\n"
        "        obs, reward, *rest = super().step(action)\n"
        "        return obs, float('nan') if self.steps == 90 else reward, *rest\n"
        "gym.register('Broken-v0', BrokenEnv, max_episode_steps=500)\n"
    )
    (tmp_path / "settings.yml").write_text("Broken-v0: {n_timesteps: 1000, policy: MlpPolicy}\n")
    custom = ["--gym-packages", "broken_env", "-conf", "settings.yml"]
    output = train("softdqn", *custom, env="Broken-v0", n=1000, folder=tmp_path, returncode=1)
    assert "DivergenceError" in output.splitlines()[-1] and "DivergenceError after 90 steps" in output
    model = load("softdqn", tmp_path / "logs" / "softdqn" / "Broken-v0_1" / "Broken-v0.zip")
    assert model.num_timesteps == 90 and model._n_updates > 0


def test_unknown_algorithm_is_upstreams_error(tmp_path: Path) -> None:
    output = run("train", "--algo", "foo", folder=tmp_path, returncode=2)
    assert "argument --algo: invalid choice: 'foo'" in output and "'mdqn'" in output and "'dqn'" in output


def test_missing_zoo_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rl_zoo3'] = None\n")
    output = run("train", "--algo", "mdqn", folder=tmp_path, returncode=1)
    assert 'needs rl_zoo3, which is not installed: pip install "sb3-softq[zoo]"' in output
    assert "Traceback" not in output


@pytest.mark.expensive
def test_record_training(folder: Path) -> None:
    # Stands in for the real program: every video that it is asked for comes into being
    ffmpeg = folder / "bin" / "ffmpeg"
    ffmpeg.parent.mkdir()
    ffmpeg.write_text('#!/bin/sh\nfor argument; do case "$argument" in *.mp4) touch "$argument" ;; esac; done\n')
    ffmpeg.chmod(0o755)
    launcher = ["env", f"PATH={ffmpeg.parent}{os.pathsep}{os.environ['PATH']}", *MODULE]
    run("record_training", "--algo", "mdqn", "-f", "logs", "-n", "10", launcher=launcher, folder=folder)
    videos = sorted(path.name.split("-")[0] for path in (first_run(folder) / "videos").glob("*.mp4"))
    assert videos == ["best", "checkpoint", "final", "training.mp4"]


@pytest.mark.expensive
@pytest.mark.parametrize("algo", VALUE_BASED)
def test_atari(algo: str, tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    train(algo, env="PongNoFrameskip-v4", n=100, folder=tmp_path)
    command = ["enjoy", "--algo", algo, "--env", "PongNoFrameskip-v4", "-f", "logs", "--no-render", "-n", "10"]
    run(*command, folder=tmp_path)


@pytest.mark.expensive
@pytest.mark.parametrize("game", MINATAR_GAMES)
def test_minatar(game: str, tmp_path: Path) -> None:
    pytest.importorskip("minatar")
    train("mdqn", env=f"MinAtar/{game}-v1", n=100, folder=tmp_path)
    command = ["--algo", "mdqn", "--env", f"MinAtar/{game}-v1", "-f", "logs", "-n", "10"]
    run("enjoy", "--no-render", *command, folder=tmp_path)
    run("record_video", *command, folder=tmp_path)
    assert list(tmp_path.glob(f"logs/mdqn/MinAtar-{game}-v1_1/videos/*.mp4"))


# ------------------------------------------------------------------ registration and settings


def test_register_changes_the_zoo_in_place_and_once() -> None:
    import rl_zoo3
    import rl_zoo3.enjoy
    import rl_zoo3.train
    from stable_baselines3 import DQN

    init, learn = ExperimentManager.__init__, ExperimentManager.learn
    register()
    # A second time even where the first was forgotten
    assert ExperimentManager.__init__ is init and ExperimentManager.learn is learn
    for table in (rl_zoo3.ALGOS, rl_zoo3.train.ALGOS, rl_zoo3.enjoy.ALGOS):
        assert table is ZOO_ALGOS and ALGOS.items() <= table.items() and table["dqn"] is DQN
    assert ALGOS.keys() <= HYPERPARAMS_SAMPLER.keys() & HYPERPARAMS_CONVERTER.keys()


def test_minatar_is_registered_as_minatar_does() -> None:
    minatar_gym = pytest.importorskip("minatar.gym")
    ours = {name: spec for name, spec in gym.registry.items() if name.startswith("MinAtar/")}
    for name in ours:
        del gym.registry[name]
    try:
        minatar_gym.register_envs()
        theirs = {name: spec for name, spec in gym.registry.items() if name.startswith("MinAtar/")}
    finally:
        gym.registry.update(ours)
    assert ours == theirs and len(ours) == 10


def test_default_config_in_the_package_then_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sb3_softq"
    monkeypatch.setattr(sb3_softq, "__file__", str(package / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="reinstall sb3_softq"):
        default_config("mdqn")
    for parent in (tmp_path, package):
        path = parent / "hyperparams" / "mdqn.yml"
        path.parent.mkdir(parents=True)
        path.touch()
        assert default_config("mdqn") == path
    with pytest.raises(ValueError, match="'dqn' is no algorithm of sb3_softq"):
        default_config("dqn")


def make_manager(algo: str, env_id: str, folder: Path, **kwargs: Any) -> ExperimentManager:
    return ExperimentManager(argparse.Namespace(), algo, env_id, str(folder), verbose=0, **kwargs)


def test_settings_file_unless_the_user_names_one(tmp_path: Path) -> None:
    assert make_manager("mdqn", "CartPole-v1", tmp_path).config == str(default_config("mdqn"))
    assert make_manager("mdqn", "CartPole-v1", tmp_path, config="my.yml").config == "my.yml"
    assert Path(make_manager("dqn", "CartPole-v1", tmp_path).config).parent.parent.name == "rl_zoo3"


def test_environment_without_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No settings for FrozenLake-v1 in .*sqn.yml, which has CartPole-v1, ") as error:
        make_manager("sqn", "FrozenLake-v1", tmp_path).read_hyperparameters()
    assert "--conf-file" in str(error.value) and "--hyperparams" in str(error.value)
    # What the message advises
    (tmp_path / "my.yml").write_text("FrozenLake-v1:\n  n_timesteps: 100000\n  policy: MlpPolicy\n")
    manager = make_manager("sqn", "FrozenLake-v1", tmp_path, config=str(tmp_path / "my.yml"), hyperparams={"gamma": 0.9})
    model: Any = manager.setup_experiment()[0]  # type: ignore[index]
    assert model.gamma == 0.9


@pytest.mark.parametrize("algo", VALUE_BASED)
def test_settings_name_arguments_of_the_constructor(algo: str) -> None:
    environments = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3", "atari"]
    environments += [f"MinAtar/{game}-v1" for game in MINATAR_GAMES] + IDENTITY_ENVIRONMENTS
    sections = yaml.safe_load(default_config(algo).read_text())
    assert sections.keys() >= set(environments)
    arguments = inspect.signature(ALGOS[algo]).parameters.keys()
    for env_id, settings in sections.items():
        assert settings.keys() <= arguments | ZOO_KEYS, env_id
        assert settings.keys() >= {"n_timesteps", "policy"}, env_id


@pytest.mark.parametrize("algo", VALUE_BASED)
@pytest.mark.parametrize(
    "env_id",
    ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3", "MinAtar/Seaquest-v1", *IDENTITY_ENVIRONMENTS],
)
def test_settings_build_a_model(algo: str, env_id: str, tmp_path: Path) -> None:
    pytest.importorskip({"LunarLander-v3": "Box2D", "MinAtar/Seaquest-v1": "minatar"}.get(env_id, "gymnasium"))
    model, settings = make_manager(algo, env_id, tmp_path, eval_freq=-1).setup_experiment()  # type: ignore[misc]
    for name in ("gamma", "batch_size", "temperature", "exploration"):
        if name in settings:
            assert getattr(model, name) == settings[name]


@pytest.mark.parametrize("algo", VALUE_BASED)
def test_sampled_parameters_are_accepted_and_found_again(algo: str) -> None:
    own_parameters = {
        "softdqn": {"temperature", "double_q", "exploration"},
        "sqn": {"temperature", "target_entropy", "exploration"},
        "mdqn": {"temperature", "munchausen_alpha", "munchausen_clip", "exploration"},
        "miqn": {"temperature", "munchausen_alpha", "munchausen_clip", "n_quantiles", "exploration"},
        "dpp": {"temperature", "operator", "gap_clip", "exploration"},
        "cvi": {"temperature", "munchausen_alpha", "exploration"},
        "modqn": {"momentum", "temperature", "exploration"},
        "mddqn": {"kl_coef", "ent_coef", "greedy_step", "regularised_evaluation", "exploration"},
        "sacd": {"ent_coef", "target_entropy", "entropy_penalty", "average_q", "munchausen_alpha"},
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(10):
        trial = study.ask()
        sampled = HYPERPARAMS_SAMPLER[algo](trial, 0, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert sampled.keys() > own_parameters[algo] | {"learning_rate", "gamma", "target_update_interval", "tau"}
        algorithm: Any = ALGOS[algo]
        model = algorithm("MlpPolicy", "CartPole-v1", **sampled)
        assert all(getattr(model, name) == sampled[name] for name in own_parameters[algo])
        study.tell(trial, 0.0)
        assert HYPERPARAMS_CONVERTER[algo](study.trials[-1].params) == sampled


def test_search_leaves_a_hindsight_buffer_alone() -> None:
    trial = optuna.create_study().ask()
    her_kwargs = {"n_sampled_goal": 4}
    sampled = HYPERPARAMS_SAMPLER["mdqn"](trial, 0, 1, {"using_her_replay_buffer": True, "her_kwargs": her_kwargs})
    assert "replay_buffer_kwargs" not in sampled and "n_sampled_goal" not in sampled


# ------------------------------------------------------------------ the command line, in this process


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--version"], 0), (["trian"], 2), ([], 2)])
def test_help_and_errors(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/rl-zoo3", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == code
    captured = capsys.readouterr()
    assert (captured.out == "") == (code != 0)
    if arguments == ["--version"]:
        assert sb3_softq.__version__ in captured.out and "rl_zoo3" in captured.out
    else:
        assert all(command in captured.out + captured.err for command in cli.COMMANDS)


@pytest.mark.filterwarnings("ignore:'rl_zoo3.load_from_hub' found in sys.modules")
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rl-zoo3", command, "--help"])
    monkeypatch.setattr(subprocess, "call", subprocess.call)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 0 and "usage: " in capsys.readouterr().out


def test_push_to_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the network: the model card is what the current Hugging Face packages made fail."""
    import huggingface_hub

    uploads = []

    class FakeApi:
        def create_repo(self, repo_id: str, **kwargs: Any) -> str:
            return repo_id

        def snapshot_download(self, local_dir: Path, **kwargs: Any) -> None:
            local_dir.mkdir(parents=True)

        def upload_folder(self, folder_path: Path, **kwargs: Any) -> None:
            uploads.append(folder_path)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    arguments = ["push_to_hub", "--algo", "mdqn", "--env", "CartPole-v1", "-f", "logs", "-orga", "someone", "--no-render"]
    monkeypatch.setattr(sys, "argv", ["rl-zoo3", *arguments])
    cli.main()
    card = (uploads[0] / "README.md").read_text()
    assert "MunchausenDQN" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "stable-baselines3" and "CartPole-v1" in metadata["tags"] and metadata["model-index"]
    assert (uploads[0] / "mdqn-CartPole-v1.zip").is_file()


@pytest.mark.filterwarnings("ignore:'rl_zoo3.load_from_hub' found in sys.modules")
def test_load_from_hub_without_normalization(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current hub package raises an exception of its own for a file that is not there, such as vec_normalize.pkl."""
    import zipfile

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    settings = first_run(folder) / "CartPole-v1"
    (settings / "env_kwargs.yml").write_text("{}")
    with zipfile.ZipFile(folder / "train_eval_metrics.zip", "w") as archive:
        archive.write(first_run(folder) / "evaluations.npz", "evaluations.npz")
    files = {path.name: path for path in settings.iterdir()}
    files |= {"mdqn-CartPole-v1.zip": first_run(folder) / "CartPole-v1.zip"}
    files |= {"train_eval_metrics.zip": folder / "train_eval_metrics.zip"}

    class NotFound(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        if filename not in files:
            raise NotFound
        return str(files[filename])

    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arguments = ["load_from_hub", "--algo", "mdqn", "--env", "CartPole-v1", "-f", "downloads", "-orga", "someone"]
    monkeypatch.setattr(sys, "argv", ["rl-zoo3", *arguments])
    monkeypatch.chdir(tmp_path)
    cli.main()
    assert (tmp_path / "downloads" / "mdqn" / "CartPole-v1_1" / "CartPole-v1.zip").is_file()
