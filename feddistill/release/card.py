"""The model card: origin, training data, clients, metrics and limitations of a student."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from feddistill.config import Config, presets
from feddistill.config.data import EmbeddedSource, FileSource, GivenPartition, HubSource, PresetSource, Source
from feddistill.config.methods import row_labels
from feddistill.config.models import HubModel, ModelConfig, PackageModel, QueryOnlyModel, TrainedTokenizer
from feddistill.config.tasks import TASKS
from feddistill.models import MeanPoolClassifier
from feddistill.models.tokenizers import separates_pairs
from feddistill.report import metric_rows, size
from feddistill.runs.trained_models import Student
from feddistill.store.run_directory import Json

EMBEDDED = {
    "wordnet_topics": ("definitions of WordNet 3.0 (Princeton University)", "WordNet 3.0 licence"),
    "sotu_eras": ("State of the Union addresses, 1790 to 2021", "public domain"),
}
"""Description and licence of each embedded data set."""


def text(student: Student, config: Config, facts: Json, licence: str, *, anonymous: bool) -> str:
    """Render the model card: the hub's metadata in YAML, then Markdown.

    Args:
        student: The exported model.
        config: The run's configuration.
        facts: ``result`` (as ``result.json``), ``clients`` and ``examples`` by client.
        licence: The student's licence, by its name on the hub.
        anonymous: Give only the number of clients, without names and numbers of examples.
    """
    result = facts["result"]
    own = result["metrics"]["student"]
    shown = TASKS[config.task].shown
    clients = [
        (f"client {place}", None, model) if anonymous else (name, facts["examples"].get(name), model)
        for place, (name, model) in enumerate(
            zip(facts["clients"], _specialists(config, facts), strict=True), 1
        )
    ]
    template = files("feddistill.release").joinpath("card.md").read_text(encoding="utf-8")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        metadata=_metadata(student, config, own, licence).to_yaml(),
        student=student,
        mean_pool=isinstance(student.model, MeanPoolClassifier),
        pairs=student.pairs,
        between="" if separates_pairs(student.tokenizer) else "\\n",
        config=config,
        result=result,
        licence=licence,
        origin=_origin(config.student.model),
        sources=_sources(config),
        clients=clients,
        elsewhere=config.data.partition.kind == "remote",
        titles=list(shown.values()),
        rows=[(row_labels()[who], [_cell(m.get(key)) for key in shown]) for who, m in metric_rows(result)],
        weights=config.aggregation.rule.weighting(),
        size=size,
        version=version("feddistill"),
    )


def _metadata(student: Student, config: Config, own: Json, licence: str) -> ModelCardData:
    source = config.student.model.source
    hubs = [given.name for given in _given(config) if isinstance(given, HubSource)]
    hubs += [presets.find(given.name).hub for given in _given(config) if isinstance(given, PresetSource)]
    pipeline = TASKS[student.task].pipeline
    return ModelCardData(
        license=licence,
        library_name="sentence-transformers"
        if isinstance(student.model, MeanPoolClassifier)
        else "transformers",
        pipeline_tag=pipeline,
        tags=["feddistill", "federated-learning", "knowledge-distillation"],
        base_model=source.name if isinstance(source, HubModel) and _of_hub(source.name) else None,
        datasets=sorted({name for name in hubs if _of_hub(name)}) or None,
        model_name=config.name,
        eval_results=[
            EvalResult(
                task_type=pipeline,
                dataset_type="test-set-of-the-run",
                dataset_name=f"{config.name}, test set",
                metric_type=key,
                metric_value=own[key],
            )
            for key in TASKS[config.task].shown
        ],
    )


def _of_hub(name: str) -> bool:
    """True if a name is a repository on the hub, not a local folder; local paths are not published."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not Path(name).exists()


def _given(config: Config) -> list[Source]:
    data = config.data
    parts = {"private": data.private, "proxy": data.proxy, "validation": data.validation, "test": data.test}
    found = [part.source for part in parts.values() if part.source is not None]
    return [*([data.source] if data.source is not None else []), *found]


def _sources(config: Config) -> list[tuple[str, str, str]]:
    """Part, description and licence of each set of texts."""
    data = config.data
    parts = ("private", "proxy", "validation", "test")
    found = []
    for part in parts:
        source = getattr(data, part).source or data.source
        if part == "private" and isinstance(data.partition, GivenPartition):
            kinds = sorted({_described(given)[0] for given in data.partition.sources.values()})
            found.append((part, "; ".join(kinds), "the clients'"))
        elif part == "private" and data.partition.kind == "remote":
            found.append((part, "the clients' own, never seen by the server", "the clients'"))
        elif source is not None:
            found.append((part, *_described(source)))
    return found


def _described(source: Source) -> tuple[str, str]:
    match source:
        case EmbeddedSource():
            return EMBEDDED[source.name]
        case FileSource():
            return "files", "not known to the run"
        case HubSource():
            subset = f" ({source.subset})" if source.subset else ""
            shown = source.name if _of_hub(source.name) else "a local data set"
            return f"{shown}{subset}, {source.split}", "see the data set's card"
        case PresetSource():
            return f"{source.name} ({presets.find(source.name).hub}), {source.split}", presets.find(
                source.name
            ).licence


def _specialists(config: Config, facts: Json) -> list[str]:
    """Description of each client's model, from the configuration."""
    models = config.clients.models
    names = facts["clients"]
    places = [_place(name, index) for index, name in enumerate(names)]
    return [_origin(models[place % len(models)]) for place in places]


def _place(name: str, index: int) -> int:
    """Index of a client in the partition, from the number in its name; excluded clients keep theirs."""
    number = name.removeprefix("client-")
    return int(number) if number.isdigit() else index


def _origin(model: ModelConfig) -> str:
    source = model.source
    if isinstance(source, HubModel):
        of = source.name if _of_hub(source.name) else "a local model"
    elif isinstance(source, PackageModel):
        of = f"{source.package}/{source.path}"
    elif isinstance(source, QueryOnlyModel):
        of = "a query-only model"
    else:
        of = f"{source.architecture} from random weights"
        if isinstance(source.tokenizer, TrainedTokenizer):
            of += ", with a tokenizer trained on the public texts"
    return of if model.layers is None else f"{of}, layers {', '.join(map(str, model.layers))}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
