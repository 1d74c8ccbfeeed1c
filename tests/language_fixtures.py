"""Runs of language models over a few addresses of each era: one client an era."""

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
        "clients": {"models": models, "training": TRAINING, "answer_batch_size": batch},
        "student": {"model": student, "training": TRAINING},
        **changes,
    }
