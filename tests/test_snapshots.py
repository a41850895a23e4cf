"""
Parameters after 200 updates are those of the code before it was made fast.

``snapshots.json`` was written by ``python tests/test_snapshots.py`` with the plain path of the version that it names. An
algorithm that is meant to change its numbers gets a new entry, by a version without the fast paths.
"""

import json
from pathlib import Path

import pytest
import torch as th
from helpers import VARIANTS, VECTOR, Float64Extractor, RandomEnv, fill_buffer, make_model, needs_compiler
from stable_baselines3.common.utils import set_random_seed

SNAPSHOTS = Path(__file__).parent / "snapshots.json"


def trained(algorithm, flat_parameters=True, **kwargs):
    """Sum and sum of squares of each parameter after 200 updates, some of them several in a call."""
    kwargs = dict(tau=0.5, target_update_interval=1, learning_rate=1e-3, exploration="eps_greedy") | kwargs
    policy_kwargs = dict(net_arch=[16, 16], features_extractor_class=Float64Extractor)
    model = make_model(algorithm, RandomEnv(VECTOR), policy_kwargs=policy_kwargs, **kwargs)
    model.policy.double()
    model.flat_parameters = flat_parameters
    if hasattr(model, "_traced"):
        model._traced.calls_before_tracing = 0
    fill_buffer(model, 100)
    for i in range(100):
        set_random_seed(i)
        model.train(1 + 2 * (i % 2), batch_size=16)
        if i % 10 == 9:
            model._on_step()
    assert model._n_updates == 200
    parameters = [parameter.detach() for parameter in model.q_net.parameters()]
    return [[parameter.sum().item(), parameter.square().sum().item()] for parameter in parameters]


each_variant = pytest.mark.parametrize("name", VARIANTS)
# Rounding grows from update to update
TOLERANCES = dict(rtol=1e-6, atol=1e-9)


def assert_is_the_snapshot(name, **options):
    algorithm, kwargs = VARIANTS[name]
    expected = json.loads(SNAPSHOTS.read_text())["sums"][name]
    th.testing.assert_close(th.tensor(trained(algorithm, **kwargs, **options)), th.tensor(expected), **TOLERANCES)


@each_variant
@pytest.mark.parametrize("flat_parameters", [True, False], ids=["fast", "plain"])
def test_parameters_after_200_updates(name, flat_parameters):
    assert_is_the_snapshot(name, flat_parameters=flat_parameters)


@pytest.mark.expensive
@needs_compiler
@each_variant
def test_parameters_after_200_compiled_updates(name):
    assert_is_the_snapshot(name, torch_compile=True)
    th.compiler.reset()


if __name__ == "__main__":
    from sb3_softq import __version__

    sums = {name: trained(algorithm, flat_parameters=False, **kwargs) for name, (algorithm, kwargs) in VARIANTS.items()}
    SNAPSHOTS.write_text(json.dumps({"version": __version__, "torch": th.__version__, "sums": sums}, indent=1) + "\n")
