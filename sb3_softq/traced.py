"""
The hooks of an algorithm as functions of tensors alone, and interpreted without Python.

An update of a small network spends most of its time between the tensor operations: in the hooks' Python, in autograd's
bookkeeping, in the calls themselves. :class:`Hooks` makes of a model's hooks functions whose inputs are parameters,
temperature and a minibatch, so that they can be traced to graphs of plain tensor operations, gradient included.
:class:`TracedTraining` lets torch's interpreter run these graphs: the same operations in the same order, so the same
numbers to the last bit, in a third of the time. :mod:`sb3_softq.compiled` hands them to the compiler.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch as th
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only

from sb3_softq.flat import FlatUpdater, Updater

if TYPE_CHECKING:
    from sb3_softq.value_based.base import ValueBasedAlgorithm

Tensors = list[th.Tensor]

# Calls with inputs of the same shapes after which they are traced: a short training never waits for that
CALLS_BEFORE_TRACING = 100
# Graphs that a model keeps; inputs of still other shapes go the plain way
MAX_GRAPHS = 8
# Changes of a model's settings after which what depends on them is no longer traced
MAX_CHANGES = 20

PLAIN_TYPES = (bool, int, float, str, type(None))


def tree_leaves(tree: Any) -> Tensors:
    """
    The tensors of samples, in order: as torch's ``tree_leaves``, in a third of its time, since every update asks for them.

    :param tree: a tensor, or a dict, a list or a named tuple of such; anything else has none
    """
    if isinstance(tree, th.Tensor):
        return [tree]
    if not isinstance(tree, (dict, list, tuple)):
        return []
    return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in tree_leaves(branch)]


def tree_like(tree: Any, leaves: Iterator[th.Tensor]) -> Any:
    """
    Samples of the same kind with other tensors.

    :param tree: samples
    :param leaves: what replaces their :func:`tree_leaves`
    """
    return tree_map_only(th.Tensor, lambda _: next(leaves), tree)


def trace(function: Callable[..., Any], *inputs: Any) -> Any:
    """
    A function as a graph of plain tensor operations.

    :param function: a function of tensors, in nested lists; whatever else it depends on becomes a constant
    :param inputs: what it is called with
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # A plain function, since make_fx counts the arguments of a method wrongly
    traced = make_fx(lambda *args: function(*args))(*inputs)
    aten = th.ops.aten
    for node in traced.graph.nodes:
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.addmm.default and node.args[2].target is aten.t.default and not node.kwargs:
            # The same operation by its shorter name
            with traced.graph.inserting_before(node):
                arguments = (node.args[1], node.args[2].args[0], node.args[0])
                node.replace_all_uses_with(traced.graph.call_function(aten.linear.default, arguments))
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


class Hooks:
    """
    A model's hooks as functions of tensors.

    :param model: the model. Its settings become constants, its parameters and temperature are inputs
    :param samples: samples of the kind to come
    """

    def __init__(self, model: "ValueBasedAlgorithm", samples: Any) -> None:
        self.model, self.samples = model, samples
        self.names = [name for name, _ in model.q_net.named_parameters()]
        # Of what :meth:`targets` returns besides the targets
        self.metric_names: list[str] = []

    @contextmanager
    def _inputs(self, parameters: Tensors, target_parameters: Tensors, temperature: Tensors) -> Iterator[None]:
        """Context in which the model's modules have other parameters and another temperature."""
        model = self.model
        current = dict(zip(self.names, parameters, strict=True))
        target = dict(zip(self.names, target_parameters, strict=True))
        with (
            _reparametrize_module(model.q_net, current),
            _reparametrize_module(model.q_net_target, target),
            model.temperature_module.replaced(temperature),
        ):
            yield

    def targets(self, parameters: Tensors, target_parameters: Tensors, temperature: Tensors, leaves: Tensors) -> Tensors:
        """
        Targets, and what to log of them.

        :param parameters: of the network
        :param target_parameters: of the target network
        :param temperature: see :meth:`~sb3_softq.temperature.Temperature.inputs`
        :param leaves: the tensors of a minibatch
        """
        with th.no_grad(), self._inputs(parameters, target_parameters, temperature):
            targets, metrics = self.model._compute_targets(tree_like(self.samples, iter(leaves)))
        self.metric_names = list(metrics)
        return [targets, *metrics.values()]

    def update(
        self, parameters: Tensors, target_parameters: Tensors, temperature: Tensors, leaves: Tensors, targets: Tensors
    ) -> Tensors:
        """
        What an update needs of a minibatch: gradient of all parameters in one tensor, and the fields of an :class:`Update`.

        :param parameters: of the network
        :param target_parameters: of the target network
        :param temperature: see :meth:`~sb3_softq.temperature.Temperature.inputs`
        :param leaves: the tensors of the minibatch
        :param targets: its targets, or nothing to compute them here
        """
        metrics: Tensors = []
        if not targets:
            target, *metrics = self.targets(parameters, target_parameters, temperature, leaves)
        else:
            (target,) = targets
        samples = tree_like(self.samples, iter(leaves))
        parameters = [parameter.detach().requires_grad_() for parameter in parameters]
        with th.enable_grad(), self._inputs(parameters, target_parameters, temperature):
            losses, q_values = self.model._compute_loss(samples, target)
            excess = self.model._excess_entropy(samples, q_values.detach())
        weights = th.full_like(losses, 1 / losses.numel())  # the gradient of their mean
        gradients = th.autograd.grad(losses, parameters, weights, allow_unused=True, materialize_grads=True)
        gradient = th.cat([gradient.reshape(-1) for gradient in gradients])
        norm = th.linalg.vector_norm(gradient)
        return [gradient, losses.detach().mean(), norm, q_values.detach(), target, *excess, *metrics]

    def actions(self, parameters: Tensors, target_parameters: Tensors, temperature: Tensors, leaves: Tensors) -> Tensors:
        """
        Actions, and the values that they are chosen by.

        :param parameters: of the network
        :param target_parameters: of the target network
        :param temperature: see :meth:`~sb3_softq.temperature.Temperature.inputs`
        :param leaves: the tensors of observations, and masks if there are any
        """
        observations, masks, sample = tree_like(self.samples, iter(leaves))
        with th.no_grad(), self._inputs(parameters, target_parameters, temperature):
            return list(self.model._act(observations, masks, sample))


class Update(NamedTuple):
    """What is known of an update before the step is taken; tensors without dimensions unless it says otherwise."""

    loss: th.Tensor
    #: before clipping
    grad_norm: th.Tensor
    #: of the minibatch, ``(n_rows, n_actions)``
    q_values: th.Tensor
    #: of the minibatch, see ``_compute_targets()``
    targets: th.Tensor
    #: for a learned temperature
    excess_entropy: th.Tensor | None
    #: of the targets, to log the mean of; of any shape
    metrics: dict[str, th.Tensor]


class Constants:
    """
    The attributes of a model that are read while it is traced, which become constants of what is traced.

    :param model: the model
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values: dict[str, Any] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context in which the model's attributes are recorded as they are read."""
        cls: Any = type(self.model)
        names: set[str] = set()

        def read(model: Any, name: str) -> Any:
            names.add(name)
            return super(cls, model).__getattribute__(name)

        self.model.__class__ = type(cls)(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})
        try:
            yield
        finally:
            self.model.__class__ = cls
        values = vars(self.model)
        self.values |= {name: values[name] for name in names & values.keys()}

    def current(self) -> bool:
        """Whether they are still what the model has."""
        values = vars(self.model)
        for name, constant in self.values.items():
            value = values.get(name)
            if value is not constant and not (type(value) in PLAIN_TYPES and value == constant):
                return False
        return True


class Graph:
    """
    A hook of a model, traced.

    :param function: a method of :class:`Hooks`
    :param hooks: whose method it is
    :param inputs: what it is called with
    """

    def __init__(self, function: Callable[..., Tensors], hooks: Hooks, inputs: list[Any]) -> None:
        self.constants = Constants(hooks.model)
        with self.constants.recorded():
            graph = trace(function, *inputs)

        def flat(*leaves: th.Tensor) -> tuple[th.Tensor, ...]:
            return tuple(graph(*tree_like(inputs, iter(leaves))))

        with warnings.catch_warnings(), th.no_grad():
            warnings.simplefilter("ignore")  # on TorchScript's future, which is why there is a plain path
            self.script = th.jit.trace(flat, tuple(tree_leaves(inputs)), check_trace=False)  # type: ignore[no-untyped-call]
        # Whether it has given the plain hook's numbers for another minibatch
        self.verified = False

    def __call__(self, leaves: Tensors) -> Tensors:
        with th.no_grad():
            return self.script(*leaves)  # type: ignore[no-any-return]


class TracedTraining:
    """
    A model's hooks, interpreted once they have been called often with inputs of the same shapes.

    A graph is used after it gave the plain hook's numbers, bit for bit, on another minibatch than it was traced with; a hook
    that cannot be traced, or depends on more than its inputs, goes on as it is. So it does where the network has modules
    that depend on the training mode, and on other devices than the CPU.

    :param model: the model
    """

    def __init__(self, model: "ValueBasedAlgorithm") -> None:
        self.model = model
        self.calls_before_tracing = CALLS_BEFORE_TRACING
        self._updater: Updater | None = None
        self._calls: Counter[tuple] = Counter()
        # None where tracing failed
        self._graphs: dict[tuple, Graph | None] = {}
        # How often a setting of the model changed that is a constant of a graph
        self._n_changes = 0

    def _possible(self, updater: Updater) -> bool:
        """Whether hooks can be traced at all; what was traced of another updater is forgotten."""
        if updater is not self._updater:
            self._updater = updater
            self._graphs.clear()
            flat = isinstance(updater, FlatUpdater) and updater.flat.data.device.type == "cpu"
            self._on = flat and not self.model.policy.has_modes
            if flat:
                assert isinstance(updater, FlatUpdater)
                self._parameters = [updater.flat.views(updater.flat.data), updater.flat_target.views(updater.flat_target.data)]
        return self._on and self.model.flat_parameters

    def targets(self, updater: Updater, samples: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        What ``model._compute_targets()`` returns.

        :param updater: what applies the model's gradients
        :param samples: one or several minibatches
        """
        targets, *metrics = self._run("targets", updater, lambda: self._plain_targets(samples), samples, [])
        return targets, dict(zip(self._metric_names, metrics, strict=True))

    def update(
        self, updater: Updater, samples: Any, targets: th.Tensor | None = None, metrics: dict[str, th.Tensor] | None = None
    ) -> Update:
        """
        Compute a minibatch's gradient, which the parameters get, and what else there is to know.

        :param updater: what applies the model's gradients
        :param samples: the minibatch
        :param targets: its targets, where they are known
        :param metrics: what to log of these
        """

        def plain() -> Tensors:
            own: Tensors = []
            minibatch_targets = targets
            if minibatch_targets is None:
                minibatch_targets, *own = self._plain_targets(samples)
            losses, q_values = self.model._compute_loss(samples, minibatch_targets)
            loss = losses.mean()
            gradient, norm = updater.backward(loss)
            excess = self.model._excess_entropy(samples, q_values)
            return [gradient, loss.detach(), norm, q_values, minibatch_targets, *excess, *own]

        gradient, loss, norm, q_values, target, *more = self._run(
            "update", updater, plain, samples, [] if targets is None else [targets], variant=targets is None
        )
        updater.set_gradient(gradient)
        excess = more.pop(0) if self.model.temperature_module.learned else None
        if metrics is None:
            metrics = dict(zip(self._metric_names, more, strict=True))
        return Update(loss, norm, q_values, target, excess, metrics)

    def act(self, observations: Any, masks: th.Tensor | None, sample: bool) -> th.Tensor:
        """
        Actions for observations.

        :param observations: states
        :param masks: valid actions, or None for all
        :param sample: whether to sample the policy, not to take its best actions
        :return: ``(n_rows,)``
        """

        def plain() -> Tensors:
            with th.no_grad():
                return list(self.model._act(observations, masks, sample))

        updater = self.model._updater
        if not isinstance(updater, FlatUpdater) or not updater.flat.in_place():
            return plain()[0]
        return self._run("actions", updater, plain, [observations, masks, sample], [], variant=sample)[0]

    def _plain_targets(self, samples: Any) -> Tensors:
        with th.no_grad():
            targets, metrics = self.model._compute_targets(samples)
        self._metric_names = list(metrics)
        return [targets, *metrics.values()]

    def _run(
        self, name: str, updater: Updater, plain: Callable[[], Tensors], samples: Any, more: Tensors, variant: bool = False
    ) -> Tensors:
        """The outputs of a hook, by its name, or ``plain()``, which gives the same. Variants have graphs of their own."""
        if not self._possible(updater):
            return plain()
        leaves = tree_leaves(samples)
        key = (name, variant, *[(leaf.shape, leaf.dtype) for leaf in leaves])
        self._calls[key] += 1
        if self._calls[key] <= self.calls_before_tracing:
            return plain()
        temperature = self.model.temperature_module.inputs()
        if key not in self._graphs:
            if len(self._graphs) < MAX_GRAPHS:
                self._graphs[key] = self._trace(
                    name, samples, [*self._parameters, temperature, leaves, *([more] if name == "update" else [])]
                )
            return plain()
        graph = self._graphs[key]
        if graph is None:
            return plain()
        if not graph.constants.current():
            self._n_changes += 1
            self._graphs[key] = None
            if self._n_changes < MAX_CHANGES:
                del self._graphs[key]
            return plain()
        inputs = [*self._parameters[0], *self._parameters[1], *temperature, *leaves, *more]
        if graph.verified:
            return graph(inputs)
        with th.random.fork_rng(devices=[]):
            results = graph(inputs)
        expected = plain()
        graph.verified = len(results) == len(expected) and all(map(th.equal, results, expected))
        if not graph.verified:
            self._graphs[key] = None
        return expected

    def _trace(self, name: str, samples: Any, inputs: list[Any]) -> Graph | None:
        hooks = Hooks(self.model, samples)
        try:
            with th.random.fork_rng(devices=[]):
                return Graph(getattr(hooks, name), hooks, inputs)
        except Exception:  # whatever tracing raises: the hook itself goes on
            return None
        finally:
            gc.collect()  # what was traced is in cycles, with all its intermediate results
