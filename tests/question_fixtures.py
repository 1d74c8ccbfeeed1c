"""Questions on made-up passages, in SQuAD's form, that a model of a few thousand weights can learn."""

import json

import numpy as np

PEOPLE = ("Anna", "Bruno", "Zoë", "David", "Elena", "Félix", "Greta", "Hugo")
THINGS = ("the red key", "an old map", "a blue hat", "the 7 coins", "a green book", "the 🎈")
PLACES = ("in the kitchen", "under the bed", "near the lake", "behind the door", "on the table")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TRAINED = {"kind": "trained", "vocab_size": 400}
PACKAGE = {"kind": "package"}


def scratch(architecture, tokenizer, **settings):
    source = {"kind": "scratch", "architecture": architecture, "settings": settings, "tokenizer": tokenizer}
    return {"source": source, "max_tokens": 64}


BERT = scratch("bert", PACKAGE, max_position_embeddings=64, **SMALL)
DISTILBERT = scratch(
    "distilbert", TRAINED, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
)


def rows(count, seed=0, unanswerable=False):
    """Who left what where; half ask what, half ask where. With ``unanswerable`` every fifth has no answer."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        people = draw.permutation(PEOPLE)[:4].tolist()
        absent, *present = people
        facts = [(who, str(draw.choice(THINGS)), str(draw.choice(PLACES))) for who in present]
        passage = "\n ".join(f"{who} left {what} {where}." for who, what, where in facts)
        who, what, where = facts[draw.integers(len(facts))]
        question, answer = (f"What did {who} leave?", what) if number % 2 else (f"Where did {who} go?", where)
        begin = passage.index(answer, passage.index(f"{who} left"))
        answers = {"text": [answer], "answer_start": [begin]}
        if unanswerable and number % 5 == 0:
            question, answers = f"What did {absent} leave?", {"text": [], "answer_start": []}
        title = ("where", "what")[number % 2]
        found.append(
            {"id": str(number), "context": passage, "question": question, "title": title, "answers": answers}
        )
    return found


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def source(path):
    return {
        "kind": "files",
        "path": str(path),
        "text_column": "context",
        "question_column": "question",
        "label_column": None,
        "source_column": "title",
    }


def settings(path, /, sizes=(60, 24, 12, 12), labelled=6, **changes):
    """Two clients of other architectures and tokenizers: one learns what, the other where."""
    training = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
    parts = ("private", "proxy", "validation", "test")
    data = {name: {"size": size} for name, size in zip(parts, sizes, strict=True)}
    data["proxy"]["labelled"] = labelled
    return {
        "name": "tiny-reading",
        "task": "question_answering",
        "rounds": 2,
        "threads": 1,
        "precision": "fp32",
        "data": {"source": source(path), "partition": {"kind": "by_source"}, **data},
        "clients": {"models": [BERT, DISTILBERT], "training": training, "eval_batch_size": 8},
        "student": {"model": BERT, "training": training},
        **changes,
    }
