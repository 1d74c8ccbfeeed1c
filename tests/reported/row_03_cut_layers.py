"""``layers: [1, 3]`` of models that build or scale a layer by its place: saved as it is, or refused."""

import sys
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from feddistill.config.models import ModelConfig
from feddistill.errors import FeddistillError
from feddistill.models import cut

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 32, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
CASES = {
    "smollm3": {**SIZE, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 0, 1]},
    "gpt2": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "modernbert": SIZE,
}
IDS, wrong = torch.arange(3, 13)[None], 0
for architecture, settings in CASES.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    model = (AutoModelForMaskedLM if architecture == "modernbert" else AutoModelForCausalLM).from_config(
        config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    try:
        cut(model, ModelConfig(layers=(1, 3)), "student.model")
    except FeddistillError as error:
        print(f"{architecture}: refused: {str(error)[:90]}...")
        continue
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        mine = model.eval()(input_ids=IDS).logits
        model.save_pretrained(folder)
        saved = type(model).from_pretrained(folder).eval()(input_ids=IDS).logits
    apart = float((saved - mine).abs().max())
    print(f"{architecture}: saved logits differ by {apart:.2g} of {float(mine.abs().max()):.2g}; right: 0")
    wrong += apart > 1e-3
sys.exit(wrong > 0)
