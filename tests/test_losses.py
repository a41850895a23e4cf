"""The quantile Huber loss in both of its forms, against sb3-contrib's and numerical gradients."""

import pytest
import torch as th

from sb3_softq import losses
from sb3_softq.losses import quantile_huber_loss

contrib = pytest.importorskip("sb3_contrib.common.utils")


def contrib_loss(current, targets):
    n = current.shape[1]
    midpoints = ((th.arange(n, dtype=th.float64) + 0.5) / n).view(1, -1, 1)  # contrib's own are float32
    return contrib.quantile_huber_loss(current, targets, midpoints, sum_over_quantiles=True)


def quantiles_of(n, n_targets, scale=2.0, dtype=th.float64, batch_size=5):
    generator = th.Generator().manual_seed(n * 1000 + n_targets)
    current = scale * th.randn(batch_size, n, generator=generator, dtype=th.float64)
    targets = scale * th.randn(batch_size, n_targets, generator=generator, dtype=th.float64) + 0.3
    return current.to(dtype).requires_grad_(), targets.to(dtype)


@pytest.fixture(params=["pairs", "sorted"])
def form(request, monkeypatch):
    monkeypatch.setattr(losses, "SORTED_FORM_MIN_PAIRS", 10**9 if request.param == "pairs" else 0)
    return request.param


@pytest.mark.parametrize(("n", "n_targets"), [(1, 1), (3, 8), (50, 50), (200, 200), (64, 32)])
@pytest.mark.parametrize("scale", [0.01, 2.0, 300.0])
def test_equal_to_contrib(form, n, n_targets, scale):
    current, targets = quantiles_of(n, n_targets, scale)
    ours = quantile_huber_loss(current, targets).mean()
    (gradient,) = th.autograd.grad(ours, current)
    theirs = contrib_loss(current, targets)
    (their_gradient,) = th.autograd.grad(theirs, current)
    assert abs(ours.item() - theirs.item()) <= 1e-10 * max(1.0, abs(theirs.item()))
    assert (gradient - their_gradient).abs().max() <= 1e-10


def test_fractions_of_each_sample(form):
    current, targets = quantiles_of(40, 30)
    fractions = th.rand(5, 40, dtype=th.float64)
    theirs = contrib.quantile_huber_loss(current, targets, cum_prob=fractions.unsqueeze(-1), sum_over_quantiles=True)
    assert quantile_huber_loss(current, targets, fractions).mean().item() == pytest.approx(theirs.item(), abs=1e-10)


def test_ties_and_thresholds(form):
    """Targets equal to a quantile, or exactly 1 away from it, where the pieces of the loss meet."""
    current = th.tensor([[0.0, 1.0, 1.0, 2.0]], dtype=th.float64, requires_grad=True)
    targets = th.tensor([[0.0, 1.0, 1.0, 2.0, 3.0, -1.0]], dtype=th.float64)
    ours = quantile_huber_loss(current, targets).mean()
    theirs = contrib_loss(current, targets)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_single_precision_far_from_zero(form):
    """Prefix sums of float32 squares around 1e4 would have no correct digit."""
    current, targets = quantiles_of(64, 64, dtype=th.float32)
    exact = quantile_huber_loss(current.double() + 1e4, targets.double() + 1e4)
    single = quantile_huber_loss(current + 1e4, targets + 1e4)
    assert (single - exact).abs().max() < 2e-2  # the rounding of 1e4 itself is 1e-3, times 64 quantiles / 2


def test_gradcheck(form):
    current, targets = quantiles_of(6, 7)
    assert th.autograd.gradcheck(lambda q: quantile_huber_loss(q, targets), (current,))


def test_forms_are_chosen_by_size(monkeypatch):
    called = []
    monkeypatch.setattr(losses, "_loss_of_pairs", lambda *args: called.append("pairs") or args[0])
    quantile_huber_loss(*quantiles_of(8, 8))
    quantile_huber_loss(*quantiles_of(200, 200))
    assert called == ["pairs"]


@pytest.mark.parametrize(
    ("shape", "target_shape", "fractions_shape"), [((4,), (4, 3), None), ((4, 3), (5, 3), None), ((4, 3), (4, 3), (4,))]
)
def test_shapes_are_checked(shape, target_shape, fractions_shape):
    fractions = None if fractions_shape is None else th.zeros(fractions_shape)
    with pytest.raises(AssertionError, match=r"quantiles|fractions"):
        quantile_huber_loss(th.zeros(shape), th.zeros(target_shape), fractions)
