"""Runs of language models over a few addresses of each era: one client an era."""

TOKENIZER = {"kind": "trained", "vocab_size": 300}
GPT2 = {
    "source": {
        "kind": "scratch",
        "architecture": "gpt2",
        "settings": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48},
        "tokenizer": TOKENIZER,
    },
    "max_tokens": 48,
}
LLAMA = {
    "source": {
        "kind": "scratch",
        "architecture": "llama",
        "settings": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "max_position_embeddings": 48,
        },
        "tokenizer": TOKENIZER,
    },
    "max_tokens": 48,
}
BASELINES = ["public_only", "local_only", "centralized", "fedavg"]

TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3}


def settings(name, models, student, /, *, task="causal_lm", sizes=(16, 6, 3, 4), batch=16, **changes):
    """``sizes``: texts that are private, public, for validation and for the test."""
    parts = ("private", "proxy", "validation", "test")
    return {
        "name": name,
        "task": task,
        "rounds": 2,
        "threads": 1,
        "precision": "fp32",
        "data": {
            "source": {"kind": "embedded", "name": "sotu_eras"},
            **{part: {"size": size} for part, size in zip(parts, sizes, strict=True)},
            "partition": {"kind": "by_source"},
        },
        "clients": {"models": models, "training": TRAINING, "eval_batch_size": batch},
        "student": {"model": student, "training": TRAINING},
        **changes,
    }


def tiny(**changes):
    """Clients of two architectures, a student of the first."""
    return settings("tiny-lm", [GPT2, LLAMA], {**GPT2, "layers": [0]}, **{"baselines": BASELINES, **changes})


def outcome(result):
    """What must be the same however a run came about."""
    return {key: result[key] for key in ("metrics", "selected_round", "ledger", "by_round", "bytes")}
