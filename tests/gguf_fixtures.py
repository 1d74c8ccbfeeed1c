"""A GGUF file of a few kilobytes: a Llama with 4-bit weights and its tokenizer."""

import json

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "the bird sings by the river and the stone lies still"
NAME = "tiny.gguf"


def write(folder, width=32, layers=2, heads=2, inner=64, seed=0):
    """Write the file into ``folder``, which it creates; returns the folder."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    stored = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)

    file = gguf.GGUFWriter(str(folder / NAME), "llama")
    file.add_context_length(64)
    file.add_vocab_size(len(tokens))
    file.add_embedding_length(width)
    file.add_block_count(layers)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(heads)
    file.add_rope_dimension_count(width // heads)
    file.add_rope_freq_base(10_000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(tokens)
    file.add_token_types([3] + [1] * (len(tokens) - 1))
    file.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    for add in (file.add_bos_token_id, file.add_eos_token_id, file.add_pad_token_id):
        add(0)

    random, kind = np.random.default_rng(seed), gguf.GGMLQuantizationType.Q4_0

    def matrix(name, *shape):
        values = random.normal(scale=0.1, size=shape).astype(np.float32)
        file.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def ones(name):
        file.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    matrix("token_embd", len(tokens), width)
    ones("output_norm")
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            ones(f"blk.{layer}.{name}")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{layer}.{name}", inner, width)
        matrix(f"blk.{layer}.ffn_down", width, inner)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return folder
