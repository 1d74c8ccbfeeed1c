"""Low-rank adapters (LoRA: Hu et al., ICLR 2022) on the attention's projections, by peft."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from feddistill import models
from feddistill.config.models import ModelConfig
from feddistill.errors import ConfigError, ModelError


def adapt(model: nn.Module, config: ModelConfig, name: str, *, head: bool) -> None:
    """Add the adapters of ``config.lora``, if any, to the layers that are not frozen; see ``add``."""
    if config.lora is not None:
        rank, alpha = config.lora.rank, config.lora.alpha
        add(model, rank, alpha, name, f"{name}.lora", head=head, first=config.freeze_layers)


def check_trains(model: nn.Module, name: str) -> None:
    """Raise ``ModelError`` if a model has nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"{name}: no parameter is trained: all are frozen, by the settings or by the source")


def count(model: nn.Module, rank: int, *, head: bool) -> int:
    """Number of parameters that ``add`` trains in all layers of a model, which is not changed."""
    factors = [
        rank * sum(module.weight.shape)
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] in models.PROJECTIONS and isinstance(module.weight, Tensor)
    ]
    heads = models.head_parameters(model) if head else set()
    return sum(factors) + sum(p.numel() for name, p in model.named_parameters() if name in heads)


def add(
    model: nn.Module, rank: int, alpha: float, name: str, setting: str, *, head: bool, first: int = 0
) -> None:
    """Add adapters to the projections, in place, and freeze all but them and, with ``head``, the head.

    Args:
        model: As built by ``models.build`` or ``causal.build``.
        rank: Rank of the two factors.
        alpha: Adapters are scaled by ``alpha / rank``.
        name: The setting of the model, for errors.
        setting: The setting that requires adapters, for errors.
        head: True to train the head whole, as one with random weights must be.
        first: Layers below this one get no adapters.

    Raises:
        ConfigError: peft is not installed.
        ModelError: The model has no projections with a known name, or none in those layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"{setting} needs the package peft: pip install 'feddistill[lora]'") from None
    leaves = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    targets = sorted(leaves & set(models.PROJECTIONS))
    if not targets:
        known = ", ".join(models.PROJECTIONS)
        raise ModelError(f"{name} has none of the projections that {setting} adapts: {known}")
    heads = models.head_parameters(model) if head else set()
    layers = list(range(first, models.depth(model, name))) if first else None
    if layers == []:
        raise ModelError(f"{name}: {setting} adapts nothing: all its layers are frozen")
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's
    )
    inject_adapter_in_model(settings, model)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in path or path in heads)
