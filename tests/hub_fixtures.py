"""Benchmarks in miniature, as the hub lays them out: parquet by subset and split, a README that says so."""

import random

import pandas
import yaml

POSITIVE = ("warm", "funny", "bright", "moving", "clever", "gentle")
NEGATIVE = ("dull", "cold", "clumsy", "noisy", "empty", "tired")
THINGS = ("film", "story", "cast", "ending", "music", "scene")

SQUAD = [
    ("q1", "Where is the tower?", ["in Paris", "Paris", "the city of Paris"]),
    ("q2", "Who built it?", ["Gustave Eiffel's company"]),
    ("q3", "How tall is it?", ["330 metres"]),
    ("q4", "Who owns the moon?", []),
]
PASSAGE = "The tower stands in Paris. It was built by Gustave Eiffel's company and is 330 metres tall."
WIKI = [
    "",
    " = First = \n",
    "",
    " The cat ( a small one ) sat on 1 @,@ 024 mats . \n",
    " = = More = = \n",
    "",
    " It slept . \n",
    "",
    " = Second = \n",
    "",
    " A well @-@ known dog \n",
]


def write(folder, subsets, classes=None):
    """``{subset: {split: rows}}`` in the hub's layout; ``classes`` names a subset's labels in its card."""
    configs, infos = [], []
    for subset, splits in subsets.items():
        (folder / subset).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            pandas.DataFrame(rows).to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
            files.append({"split": split, "path": f"{subset}/{split}-*"})
        configs.append({"config_name": subset, "data_files": files})
        if names := (classes or {}).get(subset):
            features = [
                {"name": column, "dtype": "string" if isinstance(value, str) else "int32"}
                for column, value in rows[0].items()
                if column != "label"
            ]
            label = {"name": "label", "dtype": {"class_label": {"names": dict(enumerate(names))}}}
            infos.append({"config_name": subset, "features": [*features, label]})
    card = {"configs": configs, **({"dataset_info": infos} if infos else {})}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n# Miniature\n")
    return folder


def reviews(count, seed, hidden=False):
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = draw.randrange(2)
        word = draw.choice(POSITIVE if label else NEGATIVE)
        sentence = f"a {word} {draw.choice(THINGS)} and a {draw.choice(THINGS)}"
        rows.append({"sentence": sentence, "label": -1 if hidden else label, "idx": index})
    return rows


def pairs(count, seed):
    draw = random.Random(seed)
    return [
        {
            "premise": f"the {draw.choice(THINGS)} is {draw.choice(POSITIVE)}",
            "hypothesis": f"the {draw.choice(THINGS)} is {draw.choice(NEGATIVE)}",
            "label": draw.randrange(3),
            "idx": index,
        }
        for index in range(count)
    ]


def glue(folder):
    """SST-2, whose card names the classes, and MNLI, whose card does not."""
    return write(
        folder,
        {
            "sst2": {
                "train": reviews(160, 0),
                "validation": reviews(40, 1),
                "test": reviews(30, 2, hidden=True),
            },
            "mnli": {
                "train": pairs(30, 3),
                "validation_matched": pairs(24, 4),
                "validation_mismatched": pairs(18, 5),
            },
        },
        {"sst2": ("negative", "positive")},
    )


def copa(folder):
    rows = [
        {"premise": "The cat sat.", "choice1": "It was tired.", "choice2": "It rained.", "question": "cause"},
        {"premise": "It rained.", "choice1": "We sang.", "choice2": "We got wet.", "question": "effect"},
    ]
    return write(
        folder, {"copa": {"validation": [{**row, "idx": i, "label": i} for i, row in enumerate(rows)]}}
    )


def squad(folder, version=2):
    rows = [
        {
            "id": name,
            "title": "Tower",
            "context": PASSAGE,
            "question": question,
            "answers": {"text": golds, "answer_start": [max(0, PASSAGE.find(gold)) for gold in golds]},
        }
        for name, question, golds in SQUAD
        if golds or version == 2
    ]
    subset = "squad_v2" if version == 2 else "plain_text"
    return write(folder, {subset: {"validation": rows}})


def squad_1(folder):
    return squad(folder, version=1)


def wikitext(folder):
    return write(folder, {"wikitext-2-raw-v1": {"test": [{"text": line} for line in WIKI]}})


def news(folder):
    rows = [{"article": PASSAGE, "highlights": "A tower stands in Paris.", "id": "a"}]
    rows.append({"article": f"{PASSAGE} " * 20, "highlights": "The tower is tall.", "id": "b"})
    return write(folder, {"3.0.0": {"test": rows}})
