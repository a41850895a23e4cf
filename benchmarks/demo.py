"""
Evaluate, plot and film an agent that rl-zoo3 trained: the second half of ``make demo``.

    rl-zoo3 train --algo mdqn --env CartPole-v1 --log-folder demo/logs
    python benchmarks/demo.py --algo mdqn --env CartPole-v1 --folder demo
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from PIL import Image
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results

from sb3_softq import ALGOS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_EVAL_EPISODES = 100
# Episodes that are seen neither in training nor in the evaluations during training
EVAL_SEED, FILM_SEED = 1_000_000, 2_000_000


def evaluate(model: BaseAlgorithm, env_id: str) -> np.ndarray:
    """Returns of the deterministic policy."""
    env = make_vec_env(env_id, n_envs=25, seed=EVAL_SEED)
    returns, _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=True, return_episode_rewards=True)
    env.close()
    return np.array(returns)


def plot(run: Path, algo: str, env_id: str, best_step: int, returns: np.ndarray, path: Path) -> None:
    """Learning curve: episodes while training, evaluations on the way, and that of the best agent."""
    episodes = load_results(str(run))
    steps, rewards = episodes["l"].cumsum(), episodes["r"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(steps, rewards, ".", color="C0", alpha=0.2, label="training episodes (exploring)")
    axes.plot(steps, rewards.rolling(20, min_periods=1).mean(), color="C0", label="their mean over 20 episodes")
    if (run / "evaluations.npz").exists():
        evaluations = np.load(run / "evaluations.npz")
        axes.plot(evaluations["timesteps"], evaluations["results"].mean(axis=1), "o-", color="C1", label="evaluation (greedy)")
    label = f"best agent, {len(returns)} episodes: {returns.mean():.1f} ± {returns.std():.1f}"
    axes.plot(best_step, returns.mean(), "*", color="C3", markersize=14, label=label)
    threshold = gym.spec(env_id).reward_threshold
    if threshold is not None:
        axes.axhline(threshold, color="0.5", linestyle="--", linewidth=1, label=f"solved: {threshold:g}")
    axes.set(title=f"{ALGOS[algo].__name__} on {env_id}", xlabel="environment steps", ylabel="episode return")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def film(model: BaseAlgorithm, env_id: str, path: Path, every: int = 2, width: int = 300, max_steps: int = 1000) -> float:
    """Write one episode of the deterministic policy as a GIF; every second frame, at the speed of the environment."""
    env = gym.make(env_id, render_mode="rgb_array")
    observation, _ = env.reset(seed=FILM_SEED)
    frames, episode_return = [], 0.0
    for step in range(max_steps):
        if step % every == 0:
            image = Image.fromarray(np.asarray(env.render()))
            height = round(image.height * width / image.width)
            frames.append(
                image.resize((width, height), Image.Resampling.BILINEAR).quantize(64, method=Image.Quantize.FASTOCTREE)
            )
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        episode_return += float(reward)
        if terminated or truncated:
            break
    milliseconds = round(1000 * every / env.metadata.get("render_fps", 30))
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return episode_return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=list(ALGOS), default="mdqn")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="holds logs/, gets the picture and the film")
    args = parser.parse_args()

    th.set_num_threads(1)
    run = args.folder / "logs" / args.algo / f"{args.env}_1"
    # The agent of the best evaluation on the way: the last one of a value-based training can be a lucky or an unlucky one
    best = run / "best_model.zip"
    model = ALGOS[args.algo].load(best if best.exists() else run / f"{args.env}.zip", device="cpu")
    returns = evaluate(model, args.env)
    curve, gif = args.folder / "learning_curve.png", args.folder / "agent.gif"
    plot(run, args.algo, args.env, model.num_timesteps, returns, curve)
    film_return = film(model, args.env, gif)

    print(f"\n{ALGOS[args.algo].__name__} on {args.env}: the best agent of the training, after {model.num_timesteps} steps")
    print(f"  return over {len(returns)} episodes: {returns.mean():.1f} +/- {returns.std():.1f} (lowest {returns.min():.1f})")
    threshold = gym.spec(args.env).reward_threshold
    if threshold is not None:
        print(f"  {'solved' if returns.mean() >= threshold else 'NOT solved'}: the threshold is {threshold:g}")
    print(f"  learning curve: {curve.resolve()}")
    print(f"  trained agent:  {gif.resolve()} (one episode, return {film_return:.0f})")


if __name__ == "__main__":
    main()
