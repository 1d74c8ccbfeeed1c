"""The layers of a model: which are kept, which are frozen, and their dropout."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig

from feddistill.config.models import ModelConfig
from feddistill.errors import ModelError
from feddistill.models import frozen


def cut(model: nn.Module, config: ModelConfig, name: str) -> None:
    """Remove layers, freeze parameters and set dropout, as ``config`` says.

    Raises:
        ModelError: There are no such layers, or a saved model of the kept ones would compute something else.
    """
    if config.layers is not None:
        _keep(model, config.layers, name)
    _freeze(model, config, name)
    if config.dropout is not None:
        _set_dropout(model, config.dropout)


def body_of(model: nn.Module) -> Any:
    """The model of transformers in ``model``, which may be a classifier with an encoder."""
    encoder = getattr(model, "encoder", None)
    return model if hasattr(model, "config") else encoder


def depth(model: nn.Module, name: str) -> int:
    """Number of transformer layers."""
    return len(layer_list(model, name)[1])


def layer_list(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The stack of transformer layers: the module list of the length in the model's configuration."""
    count = body_of(model).config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise ModelError(f"{name}: found no list of {count} layers to cut or freeze in {type(model).__name__}")


def frozen_depth(body: nn.Module, layers: nn.ModuleList) -> int:
    """Number of ``layers``, from the input on, that are frozen together with everything before them."""
    if _before(body, layers[0])[0]:
        return 0
    frozen_layers = [not any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return [*frozen_layers, False].index(False)


def _keep(model: nn.Module, keep: tuple[int, ...], name: str) -> None:
    path, layers = layer_list(model, name)
    for index in keep:
        if not 0 <= index < len(layers):
            raise ModelError(
                f"{name}.layers names layer {index}; the model has layers 0 to {len(layers) - 1}"
            )
    if keep == tuple(range(len(layers))):
        return
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList(layers[index] for index in keep))
    for position, index in enumerate(keep):
        for module in layers[index].modules():
            if hasattr(module, "layer_idx"):  # index of its keys and values in a cache
                module.layer_idx = position  # type: ignore[assignment]  # nn.Module types it as a tensor
    body = body_of(model)
    for key, value in list(vars(body.config).items()):  # layer_types, no_rope_layers, ...: an entry a layer
        if isinstance(value, list | tuple) and len(value) == len(layers) and key != "architectures":
            setattr(body.config, key, type(value)(value[index] for index in keep))
    body.config.num_hidden_layers = len(keep)
    _check_reload(body, keep, name)


def _check_reload(body: Any, keep: tuple[int, ...], name: str) -> None:
    """Check that a model built from the configuration of the cut one computes what the cut one does: a layer
    may be built, or scale, by its place."""
    kind = type(body).__name__
    refusal = f"{name}.layers = {list(keep)}: a saved {kind} of these layers would not be this model"
    config: PretrainedConfig = type(body.config).from_dict(body.config.to_dict())
    config._attn_implementation = body.config._attn_implementation
    config.use_cache = False
    try:
        with init_empty_weights(include_buffers=False):
            again = type(body)(config)
        # Ties between the weights are lost, their values are the same.
        again.load_state_dict(body.state_dict(), strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        lines = str(error).splitlines()
        raise ModelError(f"{refusal}: {' '.join(line.strip() for line in lines[:2])}") from None
    ids = _some_ids(body)
    was_training = body.training
    with torch.inference_mode():
        mine, other = (_first_output(part.eval()(input_ids=ids)) for part in (body, again))
    body.train(was_training)
    apart, size = float((mine - other).abs().max()), float(mine.abs().max())
    if not apart <= 1e-4 * size:
        raise ModelError(f"{refusal}: its outputs differ by {apart:.2g} of {size:.2g}; keep other layers")


def _first_output(output: Any) -> Tensor:
    """Logits, or last hidden states."""
    first: Tensor = output[0]
    return first.float()


def _some_ids(body: Any) -> Tensor:
    count = body.get_input_embeddings().weight.shape[0]
    return torch.arange(2, 10, device=body.device).remainder(count)[None]


def _freeze(model: nn.Module, config: ModelConfig, name: str) -> None:
    if not (config.freeze_embeddings or config.freeze_layers):
        return
    _, layers = layer_list(model, name)
    if config.freeze_layers > len(layers):
        raise ModelError(
            f"{name}.freeze_layers = {config.freeze_layers}, but the model has {len(layers)} layers"
        )
    if config.freeze_embeddings:
        parameters, modules = _before(body_of(model), layers[0])
        for parameter in parameters:
            parameter.requires_grad = False
        for module in modules:
            frozen.stay_in_evaluation(module)
    for layer in layers[: config.freeze_layers]:
        layer.requires_grad_(False)
        frozen.stay_in_evaluation(layer)


class _Reached(Exception):  # control flow: the layers are not run
    pass


def _before(body: Any, first: nn.Module) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """The parameters that the input of the ``first`` layer depends on: embeddings, positions and their norms
    and projections, without which backward would run down to them; and the modules that compute it."""
    ended: list[nn.Module] = []
    inputs: list[Tensor] = []

    def reached(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.extend(x for x in (*given, *named.values()) if isinstance(x, Tensor) and x.requires_grad)
        raise _Reached

    def ends(module: nn.Module, given: Any, output: Any) -> None:
        ended.append(module)

    hooks = [module.register_forward_hook(ends) for module in body.modules()]
    hooks.append(first.register_forward_pre_hook(reached, with_kwargs=True))
    parameters = [p for p in body.parameters() if p.requires_grad]
    was_training = body.training
    try:
        with torch.enable_grad():
            body.eval()(input_ids=_some_ids(body))
    except _Reached:
        pass
    finally:
        body.train(was_training)
        for hook in hooks:
            hook.remove()
    if not inputs:
        return [], [module for module in ended if not any(module.children())]
    ones = [torch.ones_like(x) for x in inputs]
    gradients = torch.autograd.grad(inputs, parameters, ones, allow_unused=True)
    used = [p for p, grad in zip(parameters, gradients, strict=True) if grad is not None]
    return used, [module for module in ended if not any(module.children())]


def _set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout in ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for key, value in vars(module).items():  # that of functions that a module calls
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, probability)
