"""Write a run's student as a ``save_pretrained`` folder with a model card; upload it to the hub."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from feddistill.errors import ModelError, RunError
from feddistill.models import MeanPoolClassifier
from feddistill.release import card
from feddistill.runs import experiment, trained_models
from feddistill.runs.trained_models import DENSE, MODULES, Student
from feddistill.store import layout
from feddistill.store.layout import RESULT
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.tasks.choose import learner_class

POOLING = "1_Pooling"
LAYOUT = (
    ("", "Transformer"),
    (POOLING, "Pooling"),
    (DENSE, "Dense"),
)
"""Folder and class of each module of a sentence-transformers model, in order of application."""


def export(run: Path, out: Path, *, licence: str = "unknown", anonymous: bool = False) -> Path:
    """Export the student of a complete run in the format of transformers; returns the folder.

    A classifier or language model is written with ``save_pretrained``. An encoder with mean pooling has no
    class in transformers: its encoder is written with ``save_pretrained``, pooling and head in the layout of
    sentence-transformers, which returns the logits as the embedding of a text. The card has code that loads
    it without that package.

    Args:
        run: A complete run.
        out: A new or empty folder.
        licence: The student's licence, by its name on the hub. The card lists the sources of the data.
        anonymous: Omit the clients' names and numbers of examples from the card.

    Raises:
        RunError: The run is not complete, or the folder is not empty or cannot be written.
    """
    RunDirectory.check_free(out, "choose another --out")
    student = trained_models.of_run(run)
    facts = _facts(run)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(student, partial)
        text = card.text(student, experiment.stored_config(run), facts, licence, anonymous=anonymous)
        (partial / "README.md").write_text(text, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)  # empty except for leftovers of a killed process
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {out}: {reason}") from None
    return out


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an exported folder to the hub, with the token of ``hf auth login``; returns its address.

    Raises:
        ModelError: No network, no token, no permission to write, or an invalid name.
    """
    import httpx
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A student of a federated distillation"
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # base classes of the hub's errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--push {repo}: {reason}; the export is complete in {folder}") from None
    return str(done.repo_url if hasattr(done, "repo_url") else done)


def _facts(run: Path) -> Json:
    """Result, clients and numbers of examples from the records of a run."""
    directory = RunDirectory.open(run)
    try:
        skew = directory.read_json(layout.SKEW)
        of_client = dict(zip(skew["clients"], skew.get("examples", ()), strict=False))
        described = {
            step.rpartition("/")[2]: directory.done(step) or {}
            for step in directory.steps(layout.DESCRIPTIONS)
        }
        return {
            "result": directory.read_json(RESULT),
            "clients": skew["clients"],
            "examples": {
                name: sum(counts)
                or of_client.get(name)
                or described.get(name, {}).get("description", {}).get("examples")
                for name, counts in zip(skew["clients"], skew["counts"], strict=True)
            },
        }
    finally:
        directory.close()


def write_model(student: Student, folder: Path) -> None:
    """Write weights, configuration and tokenizer."""
    model, tokenizer = student.model.cpu(), student.tokenizer
    tokenizer.model_max_length = student.max_tokens
    learner_class(student.task).prepare_export(model, tokenizer)
    tokenizer.save_pretrained(folder)
    names = dict(enumerate(student.labels))
    body = model.encoder if isinstance(model, MeanPoolClassifier) else model
    assert isinstance(body, PreTrainedModel)
    if student.labels:
        body.config.id2label = names
        body.config.label2id = {name: place for place, name in names.items()}
    body.save_pretrained(folder)
    if isinstance(model, MeanPoolClassifier):
        _write_head(model, student, folder)


def _write_head(model: MeanPoolClassifier, student: Student, folder: Path) -> None:
    """Write pooling and head in the layout of sentence-transformers."""
    hidden, classes = model.head.in_features, model.head.out_features

    def write(name: str, content: object) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write(
        MODULES,
        [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(LAYOUT)
        ],
    )
    write("sentence_bert_config.json", {"max_seq_length": student.max_tokens, "do_lower_case": False})
    write(
        f"{POOLING}/config.json",
        {
            "word_embedding_dimension": hidden,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    write(
        f"{DENSE}/config.json",
        {
            "in_features": hidden,
            "out_features": classes,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    head = {f"linear.{name}": value.contiguous() for name, value in model.head.state_dict().items()}
    save_file(head, folder / DENSE / "model.safetensors", metadata={"format": "pt"})
