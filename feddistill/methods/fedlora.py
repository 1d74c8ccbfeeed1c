"""Baseline: federated averaging of the student's head and low-rank adapters (LoRA: Hu et al., ICLR 2022).

Everything else of the student stays as it was pretrained, so an upload is small: the honest competitor of
answers where models are large. Adapters are peft's; what is averaged are their two factors.
"""

from torch import nn

from feddistill import models
from feddistill.errors import ConfigError, ModelError
from feddistill.methods.averaging import rounds
from feddistill.methods.learner import Learner, Session
from feddistill.store import Json


def run(session: Session) -> Json:
    """As ``fedavg``, of the adapters and the head alone."""
    config = session.config.fedlora

    def adapt(model: nn.Module) -> None:
        add_adapters(model, config.rank, config.alpha)

    learner = Learner(session, session.config.student.model, "student.model", adapt=adapt)
    return {"rounds": rounds(session, "fedlora", learner=learner)}


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Put adapters on the attention's projections, in place, and freeze all but them and the head.

    Raises:
        ConfigError: peft is not installed.
        ModelError: The model has no projections by a name that is known.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "baselines: fedlora needs the package peft: pip install 'feddistill[lora]'"
        ) from None
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = sorted(leaves & set(models.PROJECTIONS))
    if not targets:
        known = ", ".join(models.PROJECTIONS)
        raise ModelError(f"student.model has none of the projections that fedlora adapts: {known}")
    head = models.head_parameters(model)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name in head)
