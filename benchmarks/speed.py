"""
Speed benchmark: our updates and trainings beside those of SB3, sb3-contrib and sbx, in alternating blocks.

    python benchmarks/speed.py run                        # all cases, 1 and 2 threads
    python benchmarks/speed.py run --cases mlp64 --parts update --threads 1 --quick
    python benchmarks/speed.py run --parts sbx --sbx .venv-sbx/bin/python  # an environment that has sbx-rl
    python benchmarks/speed.py report                     # table and picture of what was measured

The parts are

    update      updates of the first algorithms beside SB3's DQN
    family      updates of the others for discrete actions, beside SB3's DQN and sb3-contrib's QR-DQN
    learn       whole trainings beside SB3's DQN
    continuous  updates of the algorithms for continuous actions beside SB3's SAC, and the ratio of the work they do
    loss        the loss of quantile regression beside sb3-contrib's
    sbx         updates and trainings beside sbx's DQN

Before a case is timed, its fast paths must end with the plain path's parameters, MunchausenDQN at temperature 0 and alpha 0
with those of SB3's DQN, and MunchausenSAC at alpha 0 with those of SB3's SAC, on the same minibatches; otherwise there is no
ratio. Times are of the process's CPUs or the wall clock, as ``--clock`` says; the results are ratios of neighbouring blocks,
their median and quartiles. The blocks alternate in one process, those of sbx in two.

Beside sbx, with one thread, both processes are pinned to one core (``--core``), and XLA is told not to use
threads inside of an operation; with more, neither is, and XLA takes what it finds. Its updates are one compiled loop
(``lax.scan``) for each call of ``train()``, as ours are with ``torch_compile=True``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from environments import cartpole, images, pendulum, planes
from rows import read_rows, update_rows
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_softq import (
    CVI,
    MPO,
    RERPI,
    SQN,
    MirrorDescentDQN,
    MomentumDQN,
    MunchausenDQN,
    MunchausenIQN,
    MunchausenSAC,
    SACDiscrete,
    SoftDQN,
    SoftQLearning,
)
from sb3_softq.losses import quantile_huber_loss
from sb3_softq.value_based.policies import SmallImageCNN

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = 7

CASES: dict[str, dict[str, Any]] = {
    "mlp64": {"env": cartpole, "policy": "MlpPolicy", "batch_size": 64, "net_arch": [64, 64]},
    "mlp256": {"env": cartpole, "policy": "MlpPolicy", "batch_size": 64, "net_arch": [256, 256]},
    "minatar": {"env": planes, "policy": "CnnPolicy", "batch_size": 32, "net_arch": []},
    "nature": {"env": images, "policy": "CnnPolicy", "batch_size": 32, "net_arch": []},
    "pendulum64": {"env": pendulum, "policy": "MlpPolicy", "batch_size": 256, "net_arch": [64, 64]},
    "pendulum256": {"env": pendulum, "policy": "MlpPolicy", "batch_size": 256, "net_arch": [256, 256]},
}
# Updates in a block
N_UPDATES = {"nature": 100, "pendulum64": 200, "pendulum256": 100}
# Whole learn(): environment steps between two calls of train(), updates in a call, environments
SCHEDULES = {"1 per step": (1, 1, 1), "256/128": (256, 128, 1), "8 environments": (1, 8, 8)}
OURS: dict[str, tuple[type, dict[str, Any]]] = {
    "mdqn": (MunchausenDQN, {}),
    "mdqn compiled": (MunchausenDQN, {"torch_compile": True}),
    "softdqn": (SoftDQN, {}),
    "sqn": (SQN, {}),
    "sqn compiled": (SQN, {"torch_compile": True}),
}
# The rest of the family, whose updates do other work: no floor is set for them, the numbers are for orientation
FAMILY: dict[str, tuple[type, dict[str, Any]]] = {
    "miqn, 64 quantiles": (MunchausenIQN, {}),
    "miqn, 8 quantiles": (MunchausenIQN, {"n_quantiles": 8, "n_target_quantiles": 8, "n_policy_quantiles": 16}),
    "sacd": (SACDiscrete, {}),
    "cvi": (CVI, {}),
    "modqn": (MomentumDQN, {}),
    "mddqn": (MirrorDescentDQN, {}),
}
# For continuous actions
CONTINUOUS: dict[str, tuple[type, dict[str, Any]]] = {
    "msac": (MunchausenSAC, {}),
    "sql": (SoftQLearning, {}),
    "mpo": (MPO, {}),
    "rerpi": (RERPI, {}),
}
REFERENCES = {"SB3 DQN": DQN, "contrib QR-DQN, 50 quantiles": QRDQN}


class Setting(NamedTuple):
    """
    How to measure.

    :param algos: names out of :data:`OURS`
    :param threads: number of threads of a process
    :param clock: name of the clock
    :param scale: what the lengths of the blocks are divided by
    :param sbx: Python of an environment with sbx, or None
    :param core: the core to pin processes to that are compared with sbx on one thread
    """

    algos: list[str]
    threads: int
    clock: str
    scale: int
    sbx: str | None
    core: int

    @property
    def timer(self) -> Callable[[], float]:
        return {"cpu": time.process_time, "wall": time.perf_counter}[self.clock]


class Measured(NamedTuple):
    """
    Ratios of one thing measured.

    :param what: its name
    :param reference: name of the reference
    :param ratios: name of ours -> times of the reference over times of ours
    :param facts: name of ours -> what else is known of it
    """

    what: str
    reference: str
    ratios: dict[str, list[float]]
    facts: dict[str, dict[str, Any]] = {}  # noqa: RUF012


def build(
    cls: type, case: dict[str, Any], train_freq: int = 1, gradient_steps: int = 1, n_envs: int = 1, **kwargs: Any
) -> Any:
    """A model with a filled buffer, which trains from the next step on."""
    policy_kwargs: dict[str, Any] = {"net_arch": case["net_arch"]}
    if cls is QRDQN:
        policy_kwargs["n_quantiles"] = 50
    if cls in (DQN, QRDQN) and case["env"] is planes:  # SB3's policies cannot read small planes by themselves
        policy_kwargs["features_extractor_class"] = SmallImageCNN
    if case["env"] is not pendulum:
        kwargs["target_update_interval"] = 1_000
    model = cls(
        case["policy"],
        DummyVecEnv([case["env"]] * n_envs),
        batch_size=case["batch_size"],
        buffer_size=20_000 if case["env"] is not images else 1_000,
        learning_starts=500,
        train_freq=train_freq,
        gradient_steps=gradient_steps,
        policy_kwargs=policy_kwargs,
        device="cpu",
        seed=0,
        **kwargs,
    )
    model.learn(500, log_interval=None)  # the warm-up trains nothing
    model.learning_starts = 0
    return model


# ---- What must be equal before it is timed ----


def trained(cls: type, case: dict[str, Any], flat: bool = True, **kwargs: Any) -> th.Tensor:
    """Parameters after a few updates; few, because rounding grows from update to update."""
    model = build(cls, case, **kwargs)
    model.flat_parameters = flat
    if hasattr(model, "_traced"):
        model._traced.calls_before_tracing = 0
    np.random.seed(1)
    th.manual_seed(1)
    model.train(gradient_steps=8, batch_size=case["batch_size"])
    return th.cat([parameter.detach().reshape(-1) for parameter in model.policy.parameters()])


def check_equality(case: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Largest differences of parameters between paths that must agree; raises if they do not."""
    if case["env"] is pendulum:
        differences = {"msac at alpha 0 / SAC": trained(MunchausenSAC, case, munchausen_alpha=0) - trained(SAC, case)}
        names = []
    else:
        munchausen = trained(MunchausenDQN, case, temperature=0, munchausen_alpha=0)
        differences = {"mdqn at temperature 0 and alpha 0 / DQN": munchausen - trained(DQN, case)}
    for name in names:
        cls, kwargs = OURS[name]
        differences[f"{name} / plain path"] = trained(cls, case, **kwargs) - trained(cls, case, flat=False)
    largest = {name: difference.abs().max().item() for name, difference in differences.items()}
    for name, difference in largest.items():
        if not difference < 1e-5:
            raise SystemExit(f"{name}: parameters differ by {difference:.1e} after 8 updates, so there is no ratio to report")
    return largest


def check_compiled(names: list[str], models: list[Any]) -> None:
    """Raise if a model that should train by compiled updates did not."""
    for name, model in zip(names, models, strict=True):
        if "compiled" in name and model._compiled.given_up:
            raise SystemExit(f"{name}: the updates were not compiled, so there is no ratio to report")


# ---- Measuring ----


def alternate(reference: Callable[[], float], ours: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """
    Times of the reference over times of ours; each function returns the time of a block.

    The reference, all of ours, the reference again, and so on: ours count against the mean of the references around them.
    """
    for function in (reference, *ours.values()):
        function()
    result: dict[str, list[float]] = {name: [] for name in ours}
    before = reference()
    for _ in range(BLOCKS):
        times = {name: function() for name, function in ours.items()}
        after = reference()
        for name, own_time in times.items():
            result[name].append((before + after) / 2 / own_time)
        before = after
    return result


def ratios(
    reference: Callable[[], Any], ours: dict[str, Callable[[], Any]], clock: Callable[[], float]
) -> dict[str, list[float]]:
    """:func:`alternate` for functions of this process."""

    def timed(function: Callable[[], Any]) -> Callable[[], float]:
        def block() -> float:
            start = clock()
            function()
            return clock() - start

        return block

    return alternate(timed(reference), {name: timed(function) for name, function in ours.items()})


def updates(model: Any, case: dict[str, Any], n_updates: int) -> Callable[[], None]:
    def block() -> None:
        for _ in range(n_updates):
            model.train(gradient_steps=1, batch_size=case["batch_size"])

    return block


def measure_updates(case_name: str, setting: Setting) -> Iterator[Measured]:
    case = CASES[case_name]
    n_updates = N_UPDATES.get(case_name, 500) // setting.scale
    models = {name: build(OURS[name][0], case, **OURS[name][1]) for name in setting.algos}
    ours = {name: updates(model, case, n_updates) for name, model in models.items()}
    measured = ratios(updates(build(DQN, case), case, n_updates), ours, setting.timer)
    check_compiled(setting.algos, list(models.values()))
    yield Measured("update", "SB3 DQN", measured)


def measure_family(case_name: str, setting: Setting) -> Iterator[Measured]:
    case = CASES[case_name]
    n_updates = 100 // setting.scale
    for reference, cls in REFERENCES.items():
        ours = {name: updates(build(one, case, **kwargs), case, n_updates) for name, (one, kwargs) in FAMILY.items()}
        yield Measured("update", reference, ratios(updates(build(cls, case), case, n_updates), ours, setting.timer))


def measure_learning(case_name: str, setting: Setting) -> Iterator[Measured]:
    case, n_steps = CASES[case_name], 2_048 // setting.scale

    def learn(model: Any) -> Callable[[], None]:
        # Exploring until the end of the first tenth as all do: the block is a training of its own
        return lambda: model.learn(n_steps, log_interval=None)

    for schedule, (train_freq, gradient_steps, n_envs) in SCHEDULES.items():
        kwargs = {"train_freq": train_freq, "gradient_steps": gradient_steps, "n_envs": n_envs}
        models = {name: build(OURS[name][0], case, **OURS[name][1], **kwargs) for name in setting.algos}
        ours = {name: learn(model) for name, model in models.items()}
        measured = ratios(learn(build(DQN, case, **kwargs)), ours, setting.timer)
        check_compiled(setting.algos, list(models.values()))
        yield Measured(f"learn(), {schedule}", "SB3 DQN", measured)


def work(model: Any, batch_size: int) -> float:
    """
    Multiplications in the linear layers of an update.

    For each row that passes a network, each weight counts once forward, once for its own gradient and once for that of its
    input. What else an update does is not counted: in small networks that is most of it.

    :param model: a model with continuous actions and perceptrons
    :param batch_size: size of a minibatch
    """
    # Rows of a network for each sample of a minibatch, times 1 (forward), 2 (and back to the input) or 3 (and to the weights)
    if isinstance(model, SoftQLearning):
        # Of the actor: the fixed and the updated particles. Of the critics: the next values, the loss, the density's gradient
        actor = model.n_fixed_particles + 3 * model.n_updated_particles
        critics = model.n_value_particles + 3 + 2 * model.n_fixed_particles
        if model.value_proposal == "policy":
            actor += model.n_value_particles
    elif isinstance(model, MPO):
        # Of the actor: the old policy and the new one. Of the critics: the samples' values, the loss
        actor, critics = 1 + 3, model.n_action_samples + 3
    else:
        # SAC. Of the actor: the next actions, the loss. Of the critics: the next values, both losses; ours leave out the
        # gradient of the critics' weights in the actor's loss, which SB3's computes and does not use
        actor, critics = 1 + 3, 1 + 3 + (2 if isinstance(model, MunchausenSAC) else 3)

    def weights(network: th.nn.Module) -> int:
        return sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, th.nn.Linear))

    return batch_size * (actor * weights(model.policy.actor) + critics * weights(model.policy.critic))


def measure_continuous(case_name: str, setting: Setting) -> Iterator[Measured]:
    case = CASES[case_name]
    n_updates = max(N_UPDATES[case_name] // setting.scale, 10)
    reference = build(SAC, case)
    models = {name: build(cls, case, **kwargs) for name, (cls, kwargs) in CONTINUOUS.items()}
    ours = {name: updates(model, case, n_updates) for name, model in models.items()}
    measured = ratios(updates(reference, case, n_updates), ours, setting.timer)
    reference_work = work(reference, case["batch_size"])
    expected = {
        name: {"expected": round(reference_work / work(model, case["batch_size"]), 4)} for name, model in models.items()
    }
    yield Measured("update", "SB3 SAC", measured, expected)


def measure_loss(setting: Setting) -> Iterator[Measured]:
    """Loss and gradient of quantile regression, ours over contrib's."""
    from sb3_contrib.common.utils import quantile_huber_loss as contrib_loss

    for n in (8, 50, 200):
        current, targets = th.randn(64, n, requires_grad=True), th.randn(64, n)
        repeat = range(2_000 // n)

        def contrib(current: th.Tensor = current, targets: th.Tensor = targets, repeat: range = repeat) -> None:
            for _ in repeat:
                contrib_loss(current, targets, sum_over_quantiles=True).backward()

        def ours(current: th.Tensor = current, targets: th.Tensor = targets, repeat: range = repeat) -> None:
            for _ in repeat:
                quantile_huber_loss(current, targets).mean().backward()

        yield Measured(f"quantile Huber, N = {n}", "sb3-contrib", ratios(contrib, {"ours": ours}, setting.timer))


@contextmanager
def worker(python: str, setting: Setting, options: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """A process that is one side of the comparison with sbx; the function lets it work, and returns the time of an update."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "JAX_PLATFORMS": "cpu"}
    core = None
    if setting.threads == 1:
        core = setting.core
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [python, str(Path(__file__).with_name("beside_sbx.py")), json.dumps({**options, "core": core})]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:  # waits for its end
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin, process.stdout
        if answers.readline().strip() != "ready":
            raise SystemExit(f"{options}: the process did not start")

        def block() -> float:
            requests.write("go\n")
            requests.flush()
            answer = json.loads(answers.readline())
            return answer[setting.clock] / answer["updates"]

        yield block


def measure_sbx(case_name: str, setting: Setting) -> Iterator[Measured]:
    """Beside sbx's DQN, a process for each side."""
    assert setting.sbx is not None
    case = CASES[case_name]
    # What is timed, updates in a call of train(), updates in a block
    measurements = {
        "learn(), 1 per step": ("learn", 1, 2_000),
        "learn(), 1000/1000": ("learn", 1_000, 5_000),
        "updates, 1 per call": ("updates", 1, 2_000),
        "updates, 1000 per call": ("updates", 1_000, 10_000),
    }
    for name, (what, per_call, n_updates) in measurements.items():
        options = {
            "what": what,
            "updates_per_call": per_call,
            "n_updates": max(n_updates // setting.scale, per_call),
            "batch_size": case["batch_size"],
            "net_arch": case["net_arch"],
        }
        with ExitStack() as stack:
            theirs = stack.enter_context(worker(setting.sbx, setting, {**options, "side": "sbx"}))
            ours = {
                ours_name: stack.enter_context(
                    worker(sys.executable, setting, {**options, "side": "ours", "torch_compile": compiled})
                )
                for ours_name, compiled in (("mdqn", False), ("mdqn compiled", True))
            }
            measured = alternate(theirs, ours)
        yield Measured(name, "sbx DQN", measured)


# Which cases a part is for; the first four make sure that what they time is equal
PARTS: dict[str, tuple[Callable[[str, Setting], Iterator[Measured]], list[str]]] = {
    "update": (measure_updates, ["mlp64", "mlp256", "minatar", "nature"]),
    "family": (measure_family, ["mlp64", "minatar"]),
    "learn": (measure_learning, ["mlp64", "mlp256"]),
    "continuous": (measure_continuous, ["pendulum64", "pendulum256"]),
    "sbx": (measure_sbx, ["mlp64", "mlp256"]),
}


# ---- Recording and reporting ----


def record(case: str, measured: Measured, setting: Setting) -> None:
    """Print ratios, and replace the rows of the same measurement."""
    rows = []
    for name, values in measured.ratios.items():
        facts = measured.facts.get(name, {})
        low, middle, high = statistics.quantiles(values, n=4)
        known = "".join(f", {key} {value}" for key, value in facts.items())
        ratio = f"{name:19} / {measured.reference}: {middle:.2f} [{low:.2f}, {high:.2f}]{known}"
        print(f"{case:11} {measured.what:30} {ratio}", flush=True)
        rows.append(
            {
                "case": case,
                "what": measured.what,
                "reference": measured.reference,
                "threads": setting.threads,
                "torch": th.__version__,
                "processor": platform.processor() or platform.machine(),
                "clock": setting.clock,
                "ours": name,
                "ratios": [round(value, 3) for value in values],
                **facts,
            }
        )
    keys = ("case", "what", "ours", "reference", "threads")
    update_rows(RESULTS, rows, keys)


def run(cases: list[str], parts: list[str], setting: Setting) -> None:
    th.set_num_threads(setting.threads)
    for case_name in cases:
        chosen = [measure for part, (measure, its_cases) in PARTS.items() if part in parts and case_name in its_cases]
        if chosen:
            print(f"{case_name}: largest differences {check_equality(CASES[case_name], setting.algos)}", flush=True)
        for measure in chosen:
            for measured in measure(case_name, setting):
                record(case_name, measured, setting)
    if "loss" in parts:
        for measured in measure_loss(setting):
            record("loss", measured, setting)


def report() -> None:
    """Print a table in Markdown and draw the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = ["| case | what | ratio | threads | median | quartiles | by work |", "|---|---|---|---|---|---|---|"]
    # Reference -> label, median, ratio by work; on one thread
    bars: dict[str, list[tuple[str, float, float | None]]] = {"SB3 DQN": [], "SB3 SAC": [], "sbx DQN": []}
    order = [*CASES, "loss"]
    for row in sorted(
        read_rows(RESULTS), key=lambda row: (order.index(row["case"]), row["what"], row["threads"], row["ours"])
    ):
        low, middle, high = statistics.quantiles(row["ratios"], n=4)
        name, expected = f"{row['ours']} / {row['reference']}", row.get("expected")
        cells = [row["case"], row["what"], name, row["threads"], f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        table.append("| " + " | ".join(map(str, [*cells, "" if expected is None else f"{expected:.2f}"])) + " |")
        if row["threads"] == 1 and row["reference"] in bars:
            bars[row["reference"]].append((f"{row['case']}, {row['what']}: {row['ours']}", middle, expected))
    bars = {reference: found for reference, found in bars.items() if found}
    heights = [len(found) for found in bars.values()]
    figure, all_axes = plt.subplots(
        len(bars), figsize=(8, 0.26 * sum(heights) + len(bars)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (reference, found) in zip(all_axes[:, 0], bars.items(), strict=True):
        labels, medians, by_work = zip(*reversed(found), strict=True)
        axes.barh(labels, medians)
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(y=0.01)
        if any(by_work):
            axes.plot(by_work, labels, "k|", markersize=10, markeredgewidth=2, label="by the work they do")
            axes.legend()
        axes.set_xlabel(f"times as fast as {reference} (1 thread)")
    figure.savefig(DOCS / "_static" / "speed.png", dpi=110)
    (DOCS / "_shared" / "speed.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"\nWritten: {DOCS}/_shared/speed.md, {DOCS}/_static/speed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report")
    run_parser = commands.add_parser("run")
    parts = [*PARTS, "loss"]
    run_parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    run_parser.add_argument("--parts", nargs="*", choices=parts, help="all by default; sbx with --sbx only")
    run_parser.add_argument("--algos", nargs="*", default=list(OURS), choices=list(OURS))
    run_parser.add_argument("--threads", type=int, default=0, help="1, 2, ...; both 1 and 2 by default")
    run_parser.add_argument("--clock", choices=["cpu", "wall"], default="wall")
    run_parser.add_argument("--quick", action="store_true", help="short blocks: a rough idea")
    run_parser.add_argument("--sbx", help="Python of an environment with sbx-rl")
    run_parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="for sbx with one thread")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return
    if arguments.parts is None:
        arguments.parts = [part for part in parts if part != "sbx" or arguments.sbx]
    elif "sbx" in arguments.parts and not arguments.sbx:
        parser.error("--parts sbx needs --sbx")
    if arguments.threads:
        scale = 4 if arguments.quick else 1
        setting = Setting(arguments.algos, arguments.threads, arguments.clock, scale, arguments.sbx, arguments.core)
        run(arguments.cases, arguments.parts, setting)
        return
    for n in (1, 2):  # a process each: threads of another setting would linger
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--threads", str(n)], check=True)


if __name__ == "__main__":
    main()
