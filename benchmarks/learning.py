"""
Learning benchmark: our algorithms beside those of SB3 and sb3-contrib, each with its own zoo settings.

Every run is one row of ``results/learning.jsonl``: algorithm, environment, seed, settings, the whole learning curve
and a final evaluation. Runs that are already there, with the same settings, are not repeated:

    python benchmarks/learning.py run --suite classic --jobs 2
    python benchmarks/learning.py report --suite classic
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rows import append_row, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"

# Algorithms of SB3 and sb3-contrib
REFERENCES = ["dqn", "qrdqn", "sac"]

# Environment -> number of steps (those of the zoo's DQN settings)
SUITES: dict[str, dict[str, Any]] = {
    "classic": {
        "algos": ["dqn", "qrdqn", "softdqn", "sqn", "mdqn", "miqn", "dpp", "cvi", "modqn", "mddqn", "sacd"],
        "envs": {"CartPole-v1": 50_000, "Acrobot-v1": 100_000, "LunarLander-v3": 100_000, "MountainCar-v0": 120_000},
        "seeds": 5,
    },
    "minatar": {
        "algos": ["dqn", "mdqn", "miqn", "sqn"],
        "envs": {"MinAtar/Breakout-v1": 1_000_000, "MinAtar/SpaceInvaders-v1": 500_000},
        "seeds": 3,
    },
    "pendulum": {
        "algos": ["sac", "msac", "sql", "mpo", "rerpi"],
        "envs": {"Pendulum-v1": 20_000},
        "seeds": 5,
    },
    "halfcheetah": {
        "algos": ["sac", "msac", "mpo", "rerpi"],
        "envs": {"HalfCheetah-v5": 100_000},
        "seeds": 3,
    },
}
COMPILE_HELP = "torch_compile=True for ours: the same updates but for rounding, sooner on images (their rows say so)"
N_CURVE_POINTS, N_CURVE_EPISODES, N_FINAL_EPISODES, N_EVAL_ENVS = 20, 20, 100, 20


def build(algo: str, env_id: str, seed: int, n_timesteps: int, log_folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """Create the model exactly as ``rl-zoo3 train`` does, from the YAML of the algorithm."""
    from rl_zoo3.exp_manager import ExperimentManager

    import sb3_softq.zoo

    sb3_softq.zoo.register()
    args = argparse.Namespace(algo=algo, env=env_id, seed=seed)
    config = None
    if algo == "dqn" and env_id.startswith("MinAtar"):
        config = dqn_config(sb3_softq.zoo.default_config("mdqn"), env_id, log_folder)
    elif algo == "sac" and env_id.endswith("-v5"):
        config = sac_config(env_id, log_folder)
    if algo == "qrdqn":
        use_fast_quantile_loss()
    with contextlib.redirect_stdout(io.StringIO()):  # the manager prints the settings, which are in the row
        manager = ExperimentManager(
            args,
            algo,
            env_id,
            log_folder,
            n_timesteps=n_timesteps,
            eval_freq=-1,
            seed=seed,
            verbose=0,
            device="cpu",
            config=config,
        )
        setup = manager.setup_experiment()
    assert setup is not None
    model, settings = setup
    return manager, model, dict(settings)


def dqn_config(mdqn_config: Path, env_id: str, folder: str) -> str:
    """The zoo has no settings of DQN for MinAtar: it gets those of Munchausen DQN, and the same network."""
    settings = yaml.safe_load(mdqn_config.read_text())[env_id]
    for own in ("temperature", "munchausen_alpha", "munchausen_clip", "exploration"):
        settings.pop(own, None)
    # SB3's policies cannot read MinAtar's planes by themselves
    network = "features_extractor_class=SmallImageCNN, net_arch=[]"
    policy_kwargs = settings.pop("policy_kwargs").replace("dict(", f"dict({network}, ", 1)
    path = Path(folder) / "dqn.py"
    path.write_text(
        "from sb3_softq.value_based.policies import SmallImageCNN\n"
        f"hyperparams = {{{env_id!r}: {{**{settings!r}, 'policy_kwargs': {policy_kwargs}}}}}\n"
    )
    return str(path)


def sac_config(env_id: str, folder: str) -> str:
    """The zoo names MuJoCo's environments of version 4 only: version 5 gets these settings."""
    from rl_zoo3.exp_manager import ExperimentManager

    zoo = Path(ExperimentManager(argparse.Namespace(), "sac", env_id, folder, verbose=0).config)
    path = Path(folder) / "sac.yml"
    path.write_text(yaml.safe_dump({env_id: yaml.safe_load(zoo.read_text())[env_id.replace("-v5", "-v4")]}))
    return str(path)


def use_fast_quantile_loss() -> None:
    """Give contrib's QR-DQN our form of its loss: the same but for rounding, of 170 quantiles in a tenth of the time."""
    from sb3_contrib.qrdqn import qrdqn

    from sb3_softq.losses import quantile_huber_loss

    def loss(quantiles: Any, target_quantiles: Any, sum_over_quantiles: bool = True) -> Any:
        return quantile_huber_loss(quantiles, target_quantiles).mean()

    qrdqn.quantile_huber_loss = loss  # type: ignore[assignment]


def run_one(algo: str, env_id: str, seed: int, n_timesteps: int, compiled: bool = False) -> dict[str, Any]:
    import numpy as np
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import sync_envs_normalization

    th.set_num_threads(1)

    class Curve(BaseCallback):
        """Deterministic evaluation at evenly spaced points of the run."""

        def __init__(self, eval_env: Any):
            super().__init__()
            self.eval_env = eval_env
            self.points: list[tuple[int, float]] = []

        def _on_step(self) -> bool:
            if self.num_timesteps >= (len(self.points) + 1) * n_timesteps // N_CURVE_POINTS:
                if self.model.get_vec_normalize_env() is not None:
                    sync_envs_normalization(self.training_env, self.eval_env)
                mean, _ = evaluate_policy(self.model, self.eval_env, N_CURVE_EPISODES, deterministic=True, warn=False)
                self.points.append((self.num_timesteps, float(mean)))  # type: ignore[arg-type]
            return True

    with tempfile.TemporaryDirectory() as log_folder:
        manager, model, settings = build(algo, env_id, seed, n_timesteps, log_folder)
        compiled = compiled and hasattr(model, "torch_compile")
        if compiled:
            model.torch_compile = True
        eval_env = manager.create_envs(N_EVAL_ENVS, eval_env=True, no_log=True)
        eval_env.seed(10_000 + seed)
        curve = Curve(eval_env)
        start = time.perf_counter()
        error = None
        try:
            model.learn(n_timesteps, callback=curve, log_interval=None)
        except ValueError as exception:  # a run that diverged is a result too
            error = f"{type(exception).__name__}: {exception}"
        seconds = time.perf_counter() - start
        if model.get_vec_normalize_env() is not None:
            sync_envs_normalization(model.get_env(), eval_env)
        returns, _ = evaluate_policy(
            model, eval_env, N_FINAL_EPISODES, deterministic=True, return_episode_rewards=True, warn=False
        )
    row = {
        "algo": algo,
        "env": env_id,
        "seed": seed,
        "n_timesteps": n_timesteps,
        "final_mean": float(np.mean(returns)),
        "final_std": float(np.std(returns)),
        "train_mean": float(np.mean([info["r"] for info in model.ep_info_buffer])),
        "curve": curve.points,
        "seconds": round(seconds, 1),
        "settings": {key: str(value) for key, value in sorted(settings.items())},
    }
    if compiled:
        row["compiled"] = True
    if error is not None:
        row["error"] = error
    return row


@functools.cache
def settings_of(algo: str, env_id: str) -> dict[str, str]:
    """What the YAML files say now."""
    with tempfile.TemporaryDirectory() as log_folder:
        _, model, settings = build(algo, env_id, 0, 1, log_folder)
        model.env.close()
    return {key: str(value) for key, value in sorted(settings.items())}


def is_current(row: dict[str, Any]) -> bool:
    """Whether a run was made with the settings of now."""
    return row["settings"] == settings_of(row["algo"], row["env"])


def run_suite(name: str, jobs: int, algos: list[str], envs: list[str], seeds: int, compiled: bool) -> None:
    suite = SUITES[name]
    tasks = []
    for env_id in envs or suite["envs"]:
        for algo in algos or suite["algos"]:
            # Rows of older settings make room for the new ones
            rows = [row for row in read_rows(RESULTS) if (row["algo"], row["env"]) != (algo, env_id) or is_current(row)]
            write_rows(RESULTS, rows)
            done = {row["seed"] for row in rows if (row["algo"], row["env"]) == (algo, env_id)}
            missing = set(range(seeds or suite["seeds"])) - done
            tasks += [(algo, env_id, seed, suite["envs"][env_id]) for seed in missing]
    tasks.sort(key=lambda task: task[2])  # the first seed of everything first
    print(f"{len(tasks)} runs to do", flush=True)

    def run_in_subprocess(task: tuple) -> None:
        command = [sys.executable, __file__, "one", *map(str, task), *(["--compile"] if compiled else [])]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = result.stdout.strip().splitlines()
        if result.returncode != 0 or not lines:
            print(f"{task} failed:\n{result.stderr[-2000:]}", flush=True)
            return
        row = json.loads(lines[-1])
        append_row(RESULTS, row)
        print(f"{task}: {row['final_mean']:.1f} in {row['seconds']} s {row.get('error', '')}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_in_subprocess, tasks))


def interquartile_mean(scores: list[float]) -> tuple[float, float, float]:
    """Interquartile mean over the seeds, and its 95% interval (bootstrap, with the same draws whenever it is asked)."""
    import numpy as np
    from rliable import library, metrics

    np.random.seed(0)  # rliable draws from the global generator, whatever it is given
    point, interval = library.get_interval_estimates(
        {"": np.asarray(scores)[:, None]}, lambda runs: np.array([metrics.aggregate_iqm(runs)]), reps=2000
    )
    return float(point[""][0]), float(interval[""][0, 0]), float(interval[""][1, 0])


def report(name: str) -> None:
    """Write the tables and the learning curves of the documentation, and of the classic environments the README's table."""
    suite = SUITES[name]
    cells: dict[tuple[str, str], str] = {}  # final returns
    table = ["| environment, steps | algorithm | seeds | final return | return over the whole run |", "|---|---|---|---|---|"]
    recorded = recorded_runs(suite)
    for (algo, env_id), runs in recorded.items():
        whole = [sum(mean for _, mean in row["curve"]) / len(row["curve"]) for row in runs]
        texts = [
            f"{iqm:.1f} [{low:.1f}, {high:.1f}]"
            for iqm, low, high in (interquartile_mean([row["final_mean"] for row in runs]), interquartile_mean(whole))
        ]
        table.append(f"| {env_id}, {suite['envs'][env_id]:,} | {algo} | {len(runs)} | {texts[0]} | {texts[1]} |")
        seeds = "" if len(runs) == suite["seeds"] else f" ({len(runs)} {'seed' if len(runs) == 1 else 'seeds'})"
        cells[algo, env_id] = texts[0] + seeds
    summary = ["| | " + " | ".join(suite["envs"]) + " |", "|---" * (len(suite["envs"]) + 1) + "|"]
    for algo in suite["algos"]:
        summary.append(f"| `{algo}` | " + " | ".join(cells.get((algo, env_id), "") for env_id in suite["envs"]) + " |")
    (DOCS / "_shared" / f"learning_{name}.md").write_text("\n".join(table) + "\n")
    print("\n".join([*table, "", *summary]))
    if name == "classic":
        before, start, rest = README.read_text().partition("<!-- learning_classic -->\n")
        _, end, after = rest.partition("<!-- end -->")
        README.write_text(before + start + "\n".join(summary) + "\n" + end + after)
    plot_curves(name, recorded)


def recorded_runs(suite: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Algorithm and environment -> its runs with the settings of now, in the order of the suite, if there are any."""
    rows = read_rows(RESULTS)
    runs = {
        (algo, env_id): [
            row
            for row in rows
            if (row["algo"], row["env"], row["n_timesteps"]) == (algo, env_id, n_timesteps) and is_current(row)
        ]
        for env_id, n_timesteps in suite["envs"].items()
        for algo in suite["algos"]
    }
    return {key: found for key, found in runs.items() if found}


def plot_curves(name: str, recorded: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Learning curves of a suite: interquartile means over the seeds, with their intervals where few algorithms are shown."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suite = SUITES[name]
    crowded = len(suite["algos"]) > 6
    envs = list(dict.fromkeys(env_id for _, env_id in recorded))
    n_columns = 2 if crowded else len(envs)
    shape = (-(-len(envs) // n_columns), n_columns)
    size = (6.5, 4.2) if crowded else (4.2, 3.4)
    figure, all_axes = plt.subplots(*shape, figsize=(size[0] * shape[1], size[1] * shape[0]), squeeze=False)
    for axes, env_id in zip(all_axes.flat, envs, strict=False):
        for i, algo in enumerate(suite["algos"]):
            runs = recorded.get((algo, env_id))
            if runs is None:
                continue
            curves = np.array([[mean for _, mean in row["curve"]] for row in runs])
            steps = [step for step, _ in runs[0]["curve"]]
            middle = np.array([interquartile_mean(point) for point in curves.T])
            reference = algo in REFERENCES
            color = ("black", "dimgray")[REFERENCES.index(algo) % 2] if reference else f"C{i % 10}"
            style = "--" if reference else "-"
            axes.plot(steps, middle[:, 0], style, color=color, label=algo, linewidth=2 if reference else 1.5)
            if not crowded:
                axes.fill_between(steps, middle[:, 1], middle[:, 2], color=color, alpha=0.15)
        axes.set_title(env_id)
        axes.set_xlabel("environment steps")
        axes.locator_params(axis="x", nbins=5)
    for axes in all_axes[:, 0]:
        axes.set_ylabel(f"return ({N_CURVE_EPISODES} deterministic episodes)")
    all_axes[0, 0].legend(ncols=2 if crowded else 1, fontsize="small")
    figure.tight_layout()
    figure.savefig(DOCS / "_static" / f"learning_{name}.png", dpi=110)
    print(f"\nWritten: {DOCS}/_shared/learning_{name}.md, {DOCS}/_static/learning_{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "report"):
        sub = commands.add_parser(command)
        sub.add_argument("--suite", choices=list(SUITES), default="classic")
        if command == "run":
            sub.add_argument("--jobs", type=int, default=2, help="Runs at the same time, one thread each")
            sub.add_argument("--algos", nargs="*", default=[])
            sub.add_argument("--envs", nargs="*", default=[])
            sub.add_argument("--seeds", type=int, default=0)
            sub.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    one = commands.add_parser("one", help="One run; prints its row")
    one.add_argument("algo")
    one.add_argument("env")
    one.add_argument("seed", type=int)
    one.add_argument("n_timesteps", type=int)
    one.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run_suite(arguments.suite, arguments.jobs, arguments.algos, arguments.envs, arguments.seeds, arguments.compile)
    elif arguments.command == "report":
        report(arguments.suite)
    elif arguments.command == "one":
        row = run_one(arguments.algo, arguments.env, arguments.seed, arguments.n_timesteps, arguments.compile)
        print(json.dumps(row))
