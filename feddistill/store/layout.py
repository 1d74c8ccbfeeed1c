"""Where everything lies in the folder of a run: the only module that knows a name on disk.

A *step* is a name without a suffix, such as ``rounds/001/teacher``: its record is at ``record(step)``, its
weights or logits at ``tensors(step)``.
"""

from pathlib import Path

CONFIG = "config.yaml"
RESULT = "result.json"
PROVENANCE = "provenance.json"
"""The commands that derived the run from another."""
LEDGER = "ledger.json"
ENGINE = "engine.json"
RECIPE = "recipe.json"
"""The number of the recipe of training."""
EXECUTION = "execution"
SKEW = "data/skew.json"
DIGESTS = "data/digests.json"
EVENTS = "federation.jsonl"
EVENT_COUNTS = "metrics.prom"
LOCK = ".lock"
REPORT = "report.html"
METRICS_TABLE = "metrics.csv"
ROUNDS_TABLE = "rounds.csv"
TENSORBOARD = "tensorboard"
DESCRIPTIONS = "described"
RECORDS = "records"
ALONE = "alone"
BASELINES = "baselines"
REQUEST = "spec.json"
"""The request of a round, in the round's folder."""

# In the folder of a remote client:
PROXY = "proxy.jsonl"
"""The proxy texts as the server sent them."""
INPUTS = "own.json"
"""Digests of the client's own texts and model, which must not change during a run."""

# In the folder of a launched Flower run:
OUTCOME = "outcome.json"
MESSAGES = "said.txt"
"""Progress messages of the server's process, which the command shows."""

# In the folder of a deployment:
SERVER_CONFIG = f"server/{CONFIG}"


def partial(name: str) -> str:
    """A file while it is being written; it is renamed to ``name`` when it is whole."""
    return f"{name}.partial"


def plot(name: str) -> str:
    """A plot of the report of a run or a study."""
    return f"figures/{name}.svg"


def record(step: str) -> str:
    """The record of a step."""
    return f"{RECORDS}/{step}.json"


def tensors(step: str) -> str:
    """The weights or logits of a step."""
    return f"{step}.safetensors"


def step_of(tensors: str) -> str:
    """The inverse of ``tensors``."""
    return tensors.removesuffix(".safetensors")


def envelope(step: str) -> str:
    """The envelope of an answer, beside its payload at ``tensors(step)``."""
    return f"{step}.json"


def envelope_of(payload: Path) -> Path:
    """The envelope beside a payload, in any folder."""
    return payload.with_suffix(".json")


def round_of(number: int) -> str:
    """A round, as a step and as a folder."""
    return f"rounds/{number:03d}"


def request(number: int) -> str:
    """The request of a round."""
    return f"{round_of(number)}/{REQUEST}"


def teacher(number: int) -> str:
    """The step of a round's teacher."""
    return f"{round_of(number)}/teacher"


def student(number: int) -> str:
    """The step of a round's student."""
    return f"{round_of(number)}/student"


def student_answers(number: int) -> str:
    """The step of the student's own answers, which some rules need, before a round's aggregation."""
    return f"{round_of(number)}/before"


def feedback(number: int) -> str:
    """The step of the teacher as it is sent back to the clients."""
    return f"{round_of(number)}/feedback"


def specialists(number: int) -> str:
    """The folder of the clients' trainings in a round; the first is that of each client alone."""
    return f"{ALONE}/001" if number == 1 else f"{round_of(number)}/specialists"


def specialist(number: int, client: str) -> str:
    """The step of a client's training in a round."""
    return f"{specialists(number)}/{client}"


def alone(number: int, client: str) -> str:
    """The step of a client's segment in the baseline ``local_only``."""
    return f"{ALONE}/{number:03d}/{client}"


def answers(number: int) -> str:
    """The folder of the clients' payloads in a round."""
    return f"{round_of(number)}/payloads"


def answer(number: int, client: str) -> str:
    """The step of a client's answer in a round."""
    return f"{answers(number)}/{client}"


def reports(number: int) -> str:
    """The folder of what remote clients report about a round."""
    return f"{round_of(number)}/told"


def report(number: int, client: str) -> str:
    """The step of a remote client's report about its training."""
    return f"{reports(number)}/{client}"


def answer_cost(number: int, client: str) -> str:
    """The reported cost of a remote client's answer, until the answer is whole."""
    return f"{report(number, client)}.cost.json"


def description(client: str) -> str:
    """The step of a remote client's description of itself."""
    return f"{DESCRIPTIONS}/{client}"


def method(name: str) -> str:
    """The step of a method's records."""
    return f"methods/{name}"


def baseline(name: str, number: int | None = None, *parts: str) -> str:
    """A baseline's folder, or the step or folder of one of its rounds.

    >>> baseline("fedmd", 0, "private", "client-1")
    'baselines/fedmd/000/private/client-1'
    """
    return "/".join([BASELINES, name, *([] if number is None else [f"{number:03d}"]), *parts])


def black_box_rows(model: str, texts: str, length: int, chunk: int) -> str:
    """Answers of a query-only model to one chunk of a set of texts."""
    return f"black_boxes/{model}/{texts}-{length}/{chunk:05d}.safetensors"
