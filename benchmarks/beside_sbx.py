"""
One side of the comparison with sbx (JAX): a process that trains when it is told to, and says how long that took.

``speed.py`` starts it twice, with the Python of sbx's environment and with ours, and lets the two work in turns: the one that
waits for its turn computes nothing. What is compiled is compiled before the first turn. The script imports nothing but the
library that it measures.

    echo go | python benchmarks/beside_sbx.py '{"side": "sbx", "what": "updates", "core": null, ...}'
"""

import json
import os
import sys
import time
from typing import Any


def build(settings: dict[str, Any]) -> Any:
    """sbx's DQN or our MunchausenDQN, with the same settings, after its warm-up."""
    kwargs: dict[str, Any] = {}
    if settings["side"] == "sbx":
        from sbx import DQN as Algorithm
    else:
        from sb3_softq import MunchausenDQN as Algorithm

        kwargs = {"torch_compile": settings["torch_compile"], "device": "cpu"}
    return Algorithm(
        "MlpPolicy",
        "CartPole-v1",
        batch_size=settings["batch_size"],
        buffer_size=20_000,
        learning_starts=500,
        train_freq=settings["updates_per_call"],
        gradient_steps=settings["updates_per_call"],
        target_update_interval=1_000,
        policy_kwargs={"net_arch": settings["net_arch"]},
        seed=0,
        **kwargs,
    )


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["core"] is not None:
        os.sched_setaffinity(0, {settings["core"]})  # before the libraries start their threads
    model = build(settings)
    n_updates, per_call = settings["n_updates"], settings["updates_per_call"]

    def block() -> None:
        if settings["what"] == "learn":
            model.learn(n_updates, reset_num_timesteps=False, log_interval=None)
        else:
            for _ in range(n_updates // per_call):
                model.train(batch_size=settings["batch_size"], gradient_steps=per_call)

    model.learn(3 * max(per_call, 500), log_interval=None)
    block()
    if settings["side"] == "ours" and settings["torch_compile"] and model._compiled.given_up:
        raise SystemExit("the updates were not compiled")
    print("ready", flush=True)
    for _ in sys.stdin:
        clocks = {"cpu": time.process_time, "wall": time.perf_counter}
        start, done = {name: clock() for name, clock in clocks.items()}, model._n_updates
        block()
        # Reading the loss for the log has waited for all of the updates
        seconds = {name: clock() - start[name] for name, clock in clocks.items()}
        print(json.dumps({**seconds, "updates": model._n_updates - done}), flush=True)


if __name__ == "__main__":
    main()
