"""A scratch Llama whose tokenizer has a bos token of its own: training and evaluation begin texts alike."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TEXT = "The people of the union."
WORDS = ["the", "people", "of", "union", "and", "states", "are", "one", "in", "peace", "war"]
CLI = "import sys; from feddistill.cli import main; sys.exit(main())"


def feddistill(folder, *arguments):
    command = [sys.executable, "-c", CLI, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)  # not in another checkout
    if done.returncode:
        sys.exit(f"wrong: feddistill {arguments[0]} exits {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def write_inputs(folder):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([" ".join(WORDS)], trainer)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **tokens).save_pretrained(folder / "tokenizer")
    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 12)) + "." for n in range(1, 161)]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "one.txt").write_text(TEXT)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 64}
    tokenizer = {"kind": "hub", "name": str(folder / "tokenizer")}
    source = {"kind": "scratch", "architecture": "llama", "settings": shape, "tokenizer": tokenizer}
    model, training = (
        {"source": source, "max_tokens": 64},
        {"epochs": 10, "batch_size": 4, "learning_rate": 0.01},
    )
    sizes = {"private": 80, "proxy": 60, "validation": 10, "test": 10}
    data = {name: {"size": size} for name, size in sizes.items()}
    data |= {"source": {"kind": "files", "path": str(folder / "texts.txt")}}
    data |= {"partition": {"kind": "iid", "clients": 1}}
    clients = {"models": [model], "training": training}
    config = {"task": "causal_lm", "rounds": 1, "precision": "fp32", "threads": 1, "data": data}
    config |= {"clients": clients, "student": {"model": model, "training": training}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_inputs(folder)
    feddistill(folder, "train", "run.yaml", "--out", "run")
    feddistill(folder, "export", "run", "--out", "export")
    own = json.loads(feddistill(folder, "evaluate", "run", "--texts", "one.txt", "--json"))
    model, tokenizer = (a.from_pretrained(folder / "export") for a in (AutoModelForCausalLM, AutoTokenizer))
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    # lm-evaluation-harness, generate() and `evaluate --benchmark` begin a text with the bos token.
    ids = torch.tensor([[tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]])
    with torch.no_grad():
        begun = float(model(input_ids=ids, labels=ids).loss)
    print(
        f"begun as other software does: {begun:.4f} nats a token; as in training: {own['cross_entropy']:.4f}"
    )
    print("right is: both the same")
    sys.exit(not math.isclose(begun, own["cross_entropy"], abs_tol=1e-4))
