"""Load weights: of a folder or the hub, of a GGUF file, of a PEFT adapter and its base."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from feddistill.config.models import HubModel, PackageModel
from feddistill.errors import ConfigError, ModelError
from feddistill.models.sources import first_line, gguf_of, location

FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
"""What transformers and peft raise if a model cannot be loaded."""


def pretrained(source: HubModel | PackageModel, auto: Any, name: str, **more: Any) -> Any:
    """A model of one of transformers' ``Auto`` classes with trained weights, in float32.

    Args:
        source: Of the weights. Those of a GGUF file are dequantised.
        auto: The class.
        name: The setting that errors name, as ``student.model``.
        more: Further keywords of ``from_pretrained``.

    Raises:
        ModelError: It cannot be loaded, its weights are quantised, or its adapter does not fit.
    """
    where = location(source, name)
    revision = getattr(source, "revision", None) or "main"
    base = adapter_base(source, name)
    if base is not None:
        assert isinstance(source, HubModel), "only such a source has an adapter"
        return _with_adapter(source, base, revision, auto, name, more)
    if isinstance(source, HubModel) and source.adapter == "train":
        raise ModelError(f"{name}.source.adapter = train, but {where!r} has no PEFT adapter")
    return _load(auto, where, f"a model from {where!r}", name, revision=revision, **gguf_of(source), **more)


def adapter_base(source: HubModel | PackageModel, name: str) -> str | None:
    """The base model that the PEFT adapter of ``source`` belongs to; ``None`` if it has no adapter."""
    if not isinstance(source, HubModel) or source.gguf is not None:
        return None
    try:
        found = find_adapter_config_file(source.name, revision=source.revision or "main")
    except (OSError, ValueError):  # no such model: the error comes when it is loaded
        return None
    if found is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError:
        raise ConfigError(
            f"{name}.source: {source.name!r} is an adapter, which needs the package peft: "
            "pip install 'feddistill[lora]'"
        ) from None
    try:
        settings = PeftConfig.from_pretrained(str(Path(found).parent))
    except (TypeError, *FAILURES) as error:
        raise ModelError(
            f"{name}.source: cannot read the adapter {source.name!r}: {first_line(error)}"
        ) from None
    if settings.is_prompt_learning:
        raise ModelError(
            f"{name}.source: the adapter {source.name!r} is of type {settings.peft_type}, which changes no "
            "weights; supported are adapters of weights, such as LORA"
        )
    if not settings.base_model_name_or_path:
        raise ModelError(f"{name}.source: the adapter {source.name!r} does not name its base model")
    return str(settings.base_model_name_or_path)


def _load(auto: Any, where: str, what: str, name: str, **more: Any) -> Any:
    try:
        model = auto.from_pretrained(where, dtype=torch.float32, **more)
    except FAILURES as error:
        raise ModelError(f"{name}.source: cannot load {what}: {first_line(error)}") from None
    if more.get("gguf_file"):
        _forget_quantization(model)
    elif getattr(model, "is_quantized", False):
        raise ModelError(
            f"{name}.source: {where!r} has quantised weights ({model.quantization_method}), which cannot be "
            "trained; name a model with its plain weights"
        )
    return model


def _forget_quantization(model: nn.Module) -> None:
    """Remove the marks of quantisation, which transformers sets although it has dequantised the weights: they
    forbid training and saving."""
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _with_adapter(
    source: HubModel, base: str, revision: str, auto: Any, name: str, more: dict[str, Any]
) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    model = _load(auto, base, f"{base!r}, the base model of the adapter {source.name!r}", name, **more)
    try:
        with warnings.catch_warnings():
            # peft 0.21 uses a name that transformers 5.23 has deprecated.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # an error below
            adapted = PeftModel.from_pretrained(
                model, source.name, revision=revision, is_trainable=source.adapter == "train"
            )
        stored = load_peft_weights(source.name, device="cpu", revision=revision)
    except (TypeError, *FAILURES) as error:
        raise ModelError(
            f"{name}.source: cannot load the adapter {source.name!r}: {first_line(error)}"
        ) from None
    # peft leaves out what does not fit, and only warns.
    embeddings = any("embed" in key for key in stored)
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=embeddings)
    wrong = sorted(stored.keys() ^ loaded.keys()) or sorted(
        key for key, value in stored.items() if not torch.equal(value.float(), loaded[key].float())
    )
    if wrong:
        kind = type(model).__name__
        raise ModelError(f"{name}.source: the adapter {source.name!r} does not fit {kind}: {wrong[0]}")
    if source.adapter == "train":
        whole: nn.Module = adapted.base_model.model
        return whole
    merged: nn.Module = adapted.merge_and_unload()
    return merged.requires_grad_(True)
