"""A run's student as others load it: a ``save_pretrained`` folder with a model card, and onto the hub."""

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
"""Folders and classes of a sentence-transformers model, in the order in which they work."""


def export(run: Path, out: Path, *, licence: str = "unknown", anonymous: bool = False) -> Path:
    """Write the student of a complete run as transformers loads it; returns the folder.

    A classifier or language model of transformers is its ``save_pretrained`` folder. An encoder with mean
    pooling has no class of its own there: the folder is the encoder's, with pooling and head beside it in
    the layout of sentence-transformers, which gives the logits as the text's embedding; the card has the six
    lines that do without that package.

    Args:
        run: A complete run.
        out: A new or empty folder.
        licence: Of the student, as the hub names it. What it was made of stands in the card.
        anonymous: Leave names and sizes of the clients out of the card.

    Raises:
        RunError: The run is not complete, or the folder is in the way or cannot be written.
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
            shutil.rmtree(out)  # empty but for what a killed process leaves
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {out}: {reason}") from None
    return out


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload an exported folder to the hub, with the token of ``hf auth login``; returns its address.

    Raises:
        ModelError: No network, no token, no right to write there, or a name that is none.
    """
    import httpx
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A student of a federated distillation"
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors are all of these
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--push {repo}: {reason}; the export is complete in {folder}") from None
    return str(done.repo_url if hasattr(done, "repo_url") else done)


def _facts(run: Path) -> Json:
    """What a run has recorded of itself."""
    directory = RunDirectory.open(run)
    try:
        skew = directory.read_json(layout.SKEW)
        of_client = dict(zip(skew["clients"], skew.get("examples", ()), strict=False))
        told = {
            step.rpartition("/")[2]: directory.done(step) or {}
            for step in directory.steps(layout.DESCRIPTIONS)
        }
        return {
            "result": directory.read_json(RESULT),
            "clients": skew["clients"],
            "examples": {
                name: sum(counts)
                or of_client.get(name)
                or told.get(name, {}).get("description", {}).get("examples")
                for name, counts in zip(skew["clients"], skew["counts"], strict=True)
            },
        }
    finally:
        directory.close()


def write_model(student: Student, folder: Path) -> None:
    """Weights, configuration, tokenizer: what ``export`` writes but for the card."""
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
    """Pooling and head, in the layout of sentence-transformers."""
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
