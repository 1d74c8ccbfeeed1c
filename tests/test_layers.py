"""Layers kept and frozen: a cut model is what it is saved as, and what comes before the layers is frozen."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from feddistill.config.models import ModelConfig
from feddistill.errors import ModelError
from feddistill.models.layers import cut

IDS = torch.arange(3, 13)[None]
SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER = {**SIZE, "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
MODERN = {**SIZE, "intermediate_size": 32, "max_position_embeddings": 32, "global_attn_every_n_layers": 2}
OPT = {**SIZE, "ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 8}
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 4, "n_head": 2}


def model(architecture, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SPECIAL, **settings)
    masked = architecture in ("modernbert", "bert")
    built = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():  # every part matters
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


def layers(*kept, **settings):
    return ModelConfig(layers=kept or None, **settings)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("smollm3", {**DECODER, "no_rope_layers": [1, 0, 0, 1]}),
        ("qwen2", {**DECODER, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
        ("gemma2", {**DECODER, "head_dim": 8, "sliding_window": 3}),
        ("gpt2", GPT2),
        ("llama", DECODER),
        ("opt", OPT),
    ],
)
def test_a_cut_model_is_saved_as_it_is(architecture, settings, tmp_path):
    whole = model(architecture, **settings)
    full = whole(input_ids=IDS).logits
    cut(whole, layers(1, 3), "m")
    with torch.inference_mode():
        mine = whole(input_ids=IDS).logits
        whole.save_pretrained(tmp_path)
        saved = type(whole).from_pretrained(tmp_path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(saved, mine, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mine, full, atol=1e-2)


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        (
            "gpt2",
            {**GPT2, "scale_attn_by_inverse_layer_idx": True},
            r"its outputs differ by .* of .*; keep other",
        ),
        ("modernbert", MODERN, r".*Unexpected key\(s\) in state_dict: .*layers\.0\.attn_norm"),
    ],
)
def test_a_cut_model_that_would_be_saved_as_another_is_refused(architecture, settings, reason):
    with pytest.raises(
        ModelError, match=rf"^m\.layers = \[1, 3\]: a saved .* would not be this model: {reason}"
    ):
        cut(model(architecture, **settings), layers(1, 3), "m")
    cut(model(architecture, **settings), layers(0, 1), "m")  # the first ones are built as they were


@pytest.mark.parametrize(
    ("architecture", "settings", "frozen"),
    [
        ("opt", OPT, {"embed_tokens", "embed_positions", "project_in"}),
        ("bloom", BLOOM, {"word_embeddings", "word_embeddings_layernorm"}),
        ("gpt2", {**GPT2, "tie_word_embeddings": False}, {"wte", "wpe"}),
        ("bert", {**SIZE, "intermediate_size": 32}, {"word_embeddings", "position_embeddings", "LayerNorm"}
         | {"token_type_embeddings"}),
        ("llama", {**DECODER, "tie_word_embeddings": False}, {"embed_tokens"}),
    ],
)  # fmt: skip
def test_what_comes_before_the_first_layer_is_frozen(architecture, settings, frozen):
    found = model(architecture, **settings)
    cut(found, layers(freeze_embeddings=True, freeze_layers=1), "m")
    still = {name for name, p in found.named_parameters() if not p.requires_grad}
    outside = {name.split(".")[-2] for name in still if not any(part.isdigit() for part in name.split("."))}
    assert outside == frozen
    within = {part for name in still for part in name.split(".") if part.isdigit()}
    assert within == {"0"}


def test_frozen_dropout_is_off_and_the_rest_trains():
    found = model("bert", **SIZE, intermediate_size=32)
    cut(found, layers(freeze_embeddings=True, freeze_layers=1), "m")
    found.train()
    training = {
        name: module.training for name, module in found.named_modules() if isinstance(module, nn.Dropout)
    }
    assert not training["bert.embeddings.dropout"]
    assert not training["bert.encoder.layer.0.output.dropout"]
    assert training["bert.encoder.layer.1.output.dropout"]
