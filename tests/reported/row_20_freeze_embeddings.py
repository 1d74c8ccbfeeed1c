"""``freeze_embeddings`` of an OPT: its embeddings and positions are frozen, its final norm is not."""

import sys

from transformers import OPTConfig, OPTForCausalLM

from feddistill.config.models import ModelConfig
from feddistill.models import cut

SIZE = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
model = OPTForCausalLM(OPTConfig(**SIZE, word_embed_proj_dim=8, max_position_embeddings=32))
cut(model, ModelConfig(freeze_embeddings=True), "student.model")
frozen = {name.split(".")[-2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
right = {"embed_tokens", "embed_positions", "project_in"}
print(f"frozen: {sorted(frozen)}; right: {sorted(right)}")
sys.exit(frozen != right)
