"""
A whole call of ``train()`` as one compiled function, or on a GPU as one CUDA graph.

The hooks of an algorithm are traced as they are, with the networks' parameters, the target's and the temperature as
inputs, together with the gradient, its clipping and Adam's step. Several minibatches become a loop (``scan``) inside the
compiled function, so that a call costs one entry into Python, however many updates it makes. A CUDA graph holds the
operations of all of them, one after the other.

The eager path gives the same numbers up to rounding, and takes over where this one cannot serve.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_softq.diagnostics import find_divergence
from sb3_softq.flat import FlatUpdater, Updater, clip_coefficient
from sb3_softq.replay import split_samples
from sb3_softq.traced import Constants, Hooks, Tensors, trace, tree_leaves

if TYPE_CHECKING:
    from sb3_softq.value_based.base import ValueBasedAlgorithm


def _adam(data: th.Tensor, grad: th.Tensor, moments: Tensors, rates: th.Tensor, settings: dict[str, Any]) -> Tensors:
    """One step of Adam: new data and moments. ``rates`` are lr, lr / bias_correction1, sqrt(bias_correction2)."""
    beta1, beta2 = settings["betas"]
    exp_avg = moments[0] + (grad - moments[0]) * (1 - beta1)
    exp_avg_sq = moments[1] * beta2 + grad * grad * (1 - beta2)
    data = data - rates[1] * exp_avg / (exp_avg_sq.sqrt() / rates[2] + settings["eps"])
    return [data, exp_avg, exp_avg_sq]


def adam_rates(first_step: int, n_steps: int, lr: float, betas: tuple[float, float]) -> list[list[float]]:
    """
    What of Adam's step depends on its number: computed here in float64, where float32 would lose the seventh digit.

    :param first_step: number of the first step, from 1
    :param n_steps: number of steps
    :param lr: learning rate
    :param betas: Adam's coefficients
    :return: lr, lr / bias_correction1 and sqrt(bias_correction2) of each step
    """
    steps = range(first_step, first_step + n_steps)
    return [[lr, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5] for step in steps]


# How often the updates of a model are compiled
MAX_COMPILED = 8


class CompiledUpdate:
    """
    ``n_batches`` updates on minibatches of ``batch_size``, compiled.

    :param model: the model; its hooks are traced once, so its settings are those of now. A temperature that is learned or
        follows a schedule, and the learning rate, are inputs
    :param updater: flat parameters and optimiser of the model
    :param samples: samples of the shapes to come, ``n_batches * batch_size``
    :param n_batches: number of minibatches
    :raises RuntimeError: if a CUDA graph of them does something else
    """

    def __init__(
        self, model: "ValueBasedAlgorithm", updater: FlatUpdater, samples: ReplayBufferSamples, n_batches: int
    ) -> None:
        start = time.perf_counter()
        self.model, self.updater, self.n_batches = model, updater, n_batches
        self.hooks = Hooks(model, samples)
        self.temperature = model.temperature_module
        self.frozen = model._targets_frozen()
        # Whether the updates are replayed as a CUDA graph
        self.captured = capturable(model.device)
        leaves = tree_leaves(samples)
        minibatch = [leaf[: len(leaf) // n_batches] for leaf in leaves]
        # Whether all updates of a call so far were finite
        self.fine = th.ones((), dtype=updater.flat.data.dtype, device=updater.flat.data.device)
        state, fixed, rates = self._state(), self._fixed(), self._rates()
        self.constants = Constants(model)
        with th.no_grad(), self.constants.recorded():
            # Traced to plain tensor operations, gradient included, whatever Python the hooks are written in
            if self.frozen:
                self._targets_graph = trace(self._targets, state, fixed, leaves)
                minibatch.append(self._targets(state, fixed, minibatch)[0])
            self._step_graph = trace(self._step, state, fixed, [*minibatch, rates[0]])
        with th.no_grad():
            self._function = self._run
            if model.torch_compile:
                # Of a code object of its own: torch counts compilations for each one, and gives up after a few
                run = FunctionType(CompiledUpdate._run.__code__.replace(), CompiledUpdate._run.__globals__)
                options: Any = {"cpp_wrapper": state[0].device.type == "cpu"}
                self._function = th.compile(MethodType(run, self), fullgraph=True, options=options)
            # The first call compiles; on copies, so that it trains nothing
            expected = [tensor.clone() for tensor in state]
            self._function(expected, fixed, leaves, rates)
            if self.captured:
                self._function = CapturedFunction(self._function, state, fixed, leaves, rates)
                self._check_capture(state, expected, fixed, leaves, rates)
        gc.collect()  # what was traced is in cycles, with all its intermediate results
        self.compile_seconds = time.perf_counter() - start

    # What goes in: the state, which changes from update to update; what is fixed during the call; rates of the updates

    def _state(self) -> Tensors:
        optimizer = self.updater.flat_optimizer
        state = [self.updater.flat.data, optimizer.exp_avg, optimizer.exp_avg_sq]
        if self.temperature.learned:
            state += self.temperature.adam_state()
        return [*state, self.fine.fill_(1.0)]

    def _fixed(self) -> Tensors:
        target = self.updater.flat_target.data
        # On the device: a CUDA graph reads numbers of the host once, when it is captured
        temperature = [] if self.temperature.learned else self.temperature.inputs()
        return [target, *(tensor.to(target.device) for tensor in temperature)]

    def _rates(self) -> th.Tensor:
        optimizer = self.updater.flat_optimizer
        lr = float(optimizer.optimizer.param_groups[0]["lr"])
        rates = adam_rates(optimizer.n_steps + 1, self.n_batches, lr, optimizer.settings()["betas"])
        if self.temperature.learned:
            own = adam_rates(self.temperature.n_steps + 1, self.n_batches, lr, (0.9, 0.999))
            rates = [[*network, *temperature] for network, temperature in zip(rates, own, strict=True)]
        return th.from_numpy(np.array(rates)).to(self.updater.flat.data)

    # What is traced

    def _hook_inputs(self, state: Tensors, fixed: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Parameters, the target network's and the temperature, as :class:`Hooks` take them."""
        temperature = [state[3].exp().reshape(())] if self.temperature.learned else fixed[1:]
        return self.updater.flat.views(state[0]), self.updater.flat.views(fixed[0]), temperature

    def _targets(self, state: Tensors, fixed: Tensors, leaves: Tensors) -> Tensors:
        return self.hooks.targets(*self._hook_inputs(state, fixed), leaves)

    def _step(self, state: Tensors, fixed: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """One update: new state, and the loss, the norm, the action values and what to log of the targets."""
        *leaves, rates = inputs
        targets = [leaves.pop()] if self.frozen else []
        outputs = self.hooks.update(*self._hook_inputs(state, fixed), leaves, targets)
        grad, loss, norm, q_values, _, *metrics = outputs
        grad = grad * clip_coefficient(norm, self.model.max_grad_norm)
        optimizer = self.updater.flat_optimizer
        new_state = _adam(state[0], grad, state[1:3], rates[:3], optimizer.settings())
        if self.temperature.learned:
            excess, *metrics = metrics
            new_state += _adam(state[3], excess, state[4:6], rates[3:6], {"betas": (0.9, 0.999), "eps": 1e-8})
        # An update that is not finite changes nothing, and neither do those after it
        fine = th.isfinite(loss + norm) & (state[-1] > 0)
        new_state = [th.where(fine, new, old).detach() for new, old in zip(new_state, state, strict=False)]
        return [*new_state, fine.to(loss.dtype)], [loss, norm, q_values, *metrics]

    # What is compiled

    def _run(self, state: Tensors, fixed: Tensors, leaves: Tensors, rates: th.Tensor) -> tuple[Tensors, Tensors]:
        metrics: Tensors = []
        columns = [leaf.unflatten(0, (self.n_batches, -1)) for leaf in leaves]
        if self.frozen:
            targets, *metrics = self._targets_graph(state, fixed, leaves)
            columns.append(targets.unflatten(0, (self.n_batches, -1)))
        columns.append(rates)
        if self.n_batches == 1 or self.captured:
            new_state, rows = state, []
            for i in range(self.n_batches):
                new_state, row = self._step_graph(new_state, fixed, [column[i] for column in columns])
                rows.append(row)
            outputs = [th.stack(pieces) for pieces in zip(*rows)]  # noqa: B905
        else:
            from torch._higher_order_ops.scan import scan

            # Without annotations, which the compiler would evaluate; outputs of a loop's body may not be its inputs
            def body(carry, column):  # type: ignore[no-untyped-def]
                new, out = self._step_graph(carry, fixed, column)
                return [tensor.clone() for tensor in new], [tensor.clone() for tensor in out]

            new_state, outputs = scan(body, state, columns)
        for old, new in zip(state, new_state, strict=True):
            old.copy_(new)
        return outputs, metrics

    def _check_capture(self, state: Tensors, expected: Tensors, fixed: Tensors, leaves: Tensors, rates: th.Tensor) -> None:
        """Raise unless the captured updates do what the others did; nothing is trained by that."""
        before = [tensor.clone() for tensor in state]
        try:
            self._function(state, fixed, leaves, rates)
            pairs = zip(state[:-1], expected[:-1], strict=True)
            same = all(th.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in pairs)
        finally:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        if not same:
            raise RuntimeError("the CUDA graph of the updates gives other numbers than the updates themselves")

    def count_steps(self, n_steps: int) -> None:
        """
        Count updates that were made.

        :param n_steps: their number
        """
        self.updater.flat_optimizer.count_steps(n_steps)
        if self.temperature.learned:
            self.temperature.count_steps(n_steps)
        self.model._n_updates += n_steps

    def __call__(self, samples: ReplayBufferSamples) -> tuple[th.Tensor, th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        Update the model.

        :param samples: samples of the shapes that the update was compiled for
        :return: losses and gradient norms ``(n_batches,)``, the action values of the last minibatch, what to log of the
            targets
        """
        leaves = tree_leaves(samples)
        with th.no_grad():
            outputs, metrics = self._function(self._state(), self._fixed(), leaves, self._rates())
        losses, norms, q_values, *step_metrics = outputs
        metrics = metrics or [metric[-1] for metric in step_metrics]
        return losses, norms, q_values[-1], dict(zip(self.hooks.metric_names, metrics, strict=True))


def capturable(device: th.device) -> bool:
    """
    Whether updates on a device can be captured as a graph.

    :param device: the model's device
    """
    return device.type == "cuda"


class CapturedFunction:
    """
    :meth:`CompiledUpdate._run` as a CUDA graph: its operations are launched all at once, without Python.

    The graph knows addresses, not tensors. State and target network stay where they are and are changed in place; what else
    comes in is copied to the places that the graph knows.

    :param function: the function
    :param state: what it changes
    :param fixed: the target network's parameters, and a temperature that follows a schedule
    :param leaves: the minibatches
    :param rates: of the updates
    """

    def __init__(
        self, function: Callable[..., Any], state: Tensors, fixed: Tensors, leaves: Tensors, rates: th.Tensor
    ) -> None:
        self._inputs = [tensor.clone() for tensor in [state[-1], *fixed[1:], *leaves, rates]]
        fine, *others, own_rates = self._inputs
        own_fixed, own_leaves = [fixed[0], *others[: len(fixed) - 1]], others[len(fixed) - 1 :]
        self._outputs: tuple[Tensors, Tensors] = ([], [])

        def run(state: Tensors) -> None:
            self._outputs = function([*state[:-1], fine], own_fixed, own_leaves, own_rates)

        self.graph = self._capture(run, state)

    @staticmethod
    def _capture(run: Callable[[Tensors], None], state: Tensors) -> Any:
        """Record the function, which must have run before on the stream that records it."""
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                run([tensor.clone() for tensor in state])
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph):  # runs nothing
            run(state)
        return graph

    def __call__(self, state: Tensors, fixed: Tensors, leaves: Tensors, rates: th.Tensor) -> tuple[Tensors, Tensors]:
        for own, given in zip(self._inputs, [state[-1], *fixed[1:], *leaves, rates], strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        outputs, metrics = self._outputs
        # The next call overwrites them
        return [tensor.clone() for tensor in outputs], [tensor.clone() for tensor in metrics]


class CompiledTraining:
    """
    The compiled updates of a model: made when they are first needed, for one length of a call and for single updates.

    :param model: the model
    """

    def __init__(self, model: "ValueBasedAlgorithm") -> None:
        self.model = model
        self.given_up = False
        self._updater: Updater | None = None
        self._updates: dict[tuple[int, int], CompiledUpdate] = {}
        self._length = 0
        self._n_compiled = 0

    def train(self, updater: Updater, gradient_steps: int, batch_size: int) -> int:
        """
        What ``model.train()`` does.

        :param updater: what applies the model's gradients
        :param gradient_steps: number of updates
        :param batch_size: size of a minibatch
        :return: number of updates that are left to do: all where nothing is to be compiled, and where it cannot be, of which a
            warning has said why, once
        :raises DivergenceError: if an update is not finite; the weights are those before it
        """
        model = self.model
        wanted = model.torch_compile or capturable(model.device)
        if not wanted or self.given_up or not self._possible(updater):
            return gradient_steps
        if self._updater is not updater:  # something was replaced: what was compiled refers to the old
            self._updater, self._updates = updater, {}
        if self._length == 0:
            self._length = min(gradient_steps, model.batches_at_once(batch_size))
        while gradient_steps > 0:
            # Calls of one length; what is left over is done one by one, so that no other length is compiled
            n_batches = self._length if gradient_steps >= self._length else 1
            update = self._updates.get((n_batches, batch_size))
            if update is None or not update.constants.current():
                update = self._compile(n_batches, batch_size)
            if update is None:
                return gradient_steps
            samples = model._sample(n_batches * batch_size)
            losses, grad_norms, q_values, target_metrics = update(samples)
            self._check(update, losses + grad_norms, samples)
            model._losses.append((losses, grad_norms))
            update.count_steps(n_batches)
            gradient_steps -= n_batches
        model._report(q_values, target_metrics, model._mask_rows(split_samples(samples, n_batches)[-1]))
        return 0

    def _possible(self, updater: Updater) -> bool:
        if not isinstance(updater, FlatUpdater) or not updater.flat_optimizer.shares_moments:
            self._give_up("the optimiser is no Adam without weight decay, or parts of the network are frozen")
        elif self.model.policy.has_modes:
            self._give_up("the network has modules that depend on the training mode, or that we do not know")
        return not self.given_up

    def _give_up(self, reason: str, error: bool = False) -> None:
        """Leave updates to the other path, which is worth a warning if the user asked for this one or something failed."""
        self.given_up = True
        if self.model.torch_compile:
            warnings.warn(f"torch_compile=True, but updates are not compiled: {reason}. They run without the compiler, slower")
        elif error:
            warnings.warn(f"Updates are not captured as a CUDA graph: {reason}. They run without it, slower")

    def _compile(self, n_batches: int, batch_size: int) -> CompiledUpdate | None:
        model, updater = self.model, self._updater
        self._n_compiled += 1
        if self._n_compiled > MAX_COMPILED:
            self._give_up("settings of the model, which are constants of what is compiled, change too often")
            return None
        assert model.replay_buffer is not None and isinstance(updater, FlatUpdater)
        # A sample to compile with must not change which ones are drawn to train with
        random_state = np.random.get_state()
        with th.random.fork_rng():
            samples = model._sample(n_batches * batch_size)
        np.random.set_state(random_state)
        try:
            update = CompiledUpdate(model, updater, samples, n_batches)
        except Exception as error:  # whatever a compiler raises: there is a path without it
            self._give_up(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", error=True)
            return None
        self._updates[n_batches, batch_size] = update
        model.logger.record("time/compile_seconds", update.compile_seconds)
        if model.verbose >= 1 and model.torch_compile:
            print(f"Compiled {n_batches} update(s) of batch size {batch_size} in {update.compile_seconds:.1f} s")
        return update

    def _check(self, update: CompiledUpdate, results: th.Tensor, samples: ReplayBufferSamples) -> None:
        """Raise if an update was not finite: it changed nothing, and neither did those after it."""
        if math.isfinite(results.sum().item()):
            return
        model, first = self.model, int((~th.isfinite(results)).nonzero()[0])
        update.count_steps(first)
        replay_data = split_samples(samples, len(results))[first]
        with th.no_grad():
            targets, _ = model._compute_targets(replay_data)
            losses, q_values = model._compute_loss(replay_data, targets)
        raise find_divergence(replay_data, targets, q_values, losses.mean(), model._n_updates, model.num_timesteps)
