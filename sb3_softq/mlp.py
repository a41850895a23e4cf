"""Multi-layer perceptrons of linear layers and ReLUs as a single operation of autograd."""

from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable


def relu_mlp_layers(module: nn.Module) -> list[nn.Linear] | None:
    """
    The linear layers of a plain multi-layer perceptron.

    :param module: any module
    :return: its layers if it is a sequence of linear layers with ReLUs between them, else None
    """
    if type(module) is not nn.Sequential or len(module) % 2 == 0:
        return None
    layers = [layer for layer in module if type(layer) is nn.Linear and layer.bias is not None]
    relus = [layer for layer in module if type(layer) is nn.ReLU]
    plain = len(layers) == len(relus) + 1 and all(type(layer) is nn.ReLU for layer in list(module)[1::2])
    return layers if plain else None


def relu_mlp(inputs: th.Tensor, layers: list[nn.Linear]) -> th.Tensor:
    """
    Output of a multi-layer perceptron with ReLUs between its layers: the numbers of ``nn.Sequential``, sooner.

    :param inputs: ``(batch_size, input_dim)``
    :param layers: its linear layers
    :return: ``(batch_size, output_dim)``
    """
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    if th.is_grad_enabled():
        return _ReluMLP.apply(inputs, *parameters)  # type: ignore[no-any-return]
    return _forward(inputs, parameters)[-1]


def _forward(inputs: th.Tensor, parameters: Any) -> list[th.Tensor]:
    """The inputs of each layer, and the output."""
    activations = [inputs]
    for i in range(0, len(parameters), 2):
        outputs = th.addmm(parameters[i + 1], activations[-1], parameters[i].t())
        activations.append(outputs.relu_() if i + 2 < len(parameters) else outputs)
    return activations


class _ReluMLP(th.autograd.Function):
    """One node of autograd's graph for the whole perceptron, instead of two or three for each layer."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        *layer_inputs, outputs = _forward(inputs, parameters)
        ctx.save_for_backward(*layer_inputs, *parameters)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor | None, ...]:
        n_layers = len(ctx.saved_tensors) // 3
        layer_inputs, parameters = ctx.saved_tensors[:n_layers], ctx.saved_tensors[n_layers:]
        gradients: list[th.Tensor | None] = []
        for i in reversed(range(n_layers)):
            gradients += [gradient.sum(dim=0), gradient.t() @ layer_inputs[i]]
            if i > 0:
                # The ReLU lets the gradient through where its output is positive
                gradient = th.ops.aten.threshold_backward(gradient @ parameters[2 * i], layer_inputs[i], 0)
        gradients.append(gradient @ parameters[0] if ctx.needs_input_grad[0] else None)
        return tuple(reversed(gradients))
