"""Baseline: FedFed, adapted to text (after Yang et al., "FedFed: Feature Distillation against Data
Heterogeneity in Federated Learning", NeurIPS 2023).

The original shares the performance-sensitive features of each image, with noise, and every client trains on
the shared features of all clients. The adaptation shares the tokens of a text to which the loss of its label
is most sensitive, and replaces some of them at random as noise. **It leaks more than the other methods: words
of private texts leave the client.**
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from feddistill import models, training
from feddistill.accounting import measure
from feddistill.methods.averaging import averaging_jobs, rounds
from feddistill.methods.job import Job
from feddistill.modelio.padding import TYPE, Tokens, inputs, pad
from feddistill.seeds import generator
from feddistill.store import layout
from feddistill.store.records import StepRecord, Traffic
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, examples_of, labels_of
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples
from feddistill.types import Cost, TextSet

BYTES = 4
"""Bytes of a shared token or label."""


def run(session: Session) -> Json:
    """Share sensitive tokens once, then run ``fedavg`` on private and shared texts."""
    model = session.config.student.model.model_copy(update={"frozen_cache_mb": 0})  # gradients of embeddings
    learner = learner_of(session, model, "student.model")
    shared = {private.name: share(session, learner, private) for private in session.splits.private}
    tokens = [text for texts, _, _ in shared.values() for text in texts]
    labels = torch.cat([labels for _, labels, _ in shared.values()])
    cost = sum((spent for _, _, spent in shared.values()), Cost())

    def lessons(private: TextSet) -> TrainingExamples:
        own = examples_of(learner, private)
        return TrainingExamples([*own.tokens, *tokens], torch.cat([own.labels, labels]))

    records = rounds(session, "fedfed", learner=learner, lessons=lessons)
    sent = BYTES * (sum(map(len, tokens)) + len(labels))
    first = StepRecord.from_json(records[0])
    traffic = first.bytes or Traffic()
    costs = {**{what: asdict(spent) for what, spent in first.costs.items()}, "share": asdict(cost)}
    sizes = Traffic(uplink=traffic.uplink + sent, downlink=traffic.downlink + sent * len(shared))
    return {"rounds": [{**records[0], "bytes": sizes.as_json(), "costs": costs}, *records[1:]]}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    config, shared = session.config, []
    for private in session.splits.private:  # training and gradients to find the sensitive tokens
        own, settings = list(student.tokens(private)), config.clients.training
        yield Job("baseline_fedfed", student, own, settings, training.steps_of(settings, len(own)))
        gradients = -(-len(own) // settings.batch_size)  # one pass
        yield Job("baseline_fedfed", student, own, settings, gradients)
        shared += [text[: max(1, round(config.fedfed.share * len(text)))] for text in own]
    yield from averaging_jobs(session, "fedfed", student, shared)


def share(session: Session, learner: Learner, private: TextSet) -> tuple[list[list[int]], Tensor, Cost]:
    """The noised sensitive tokens of each private text in text order, the labels, and the cost."""
    config = session.config
    record = learner.step(
        layout.baseline("fedfed", 0, private.name),
        f"fedfed: {private.name} trains a model to find sensitive tokens",
        None,
        lambda: examples_of(learner, private),
        config.clients.training,
        evaluate=False,
    )
    learner.restore(StepRecord.from_json(record).file)
    random = generator(config.seed, "fedfed", private.name)
    size = models.embeddings(learner.model).num_embeddings
    tokens, kept, before = learner.tokens(private), [], learner.meter.flops
    with measure() as finding:
        found = sensitivity(learner, tokens, labels_of(private))
        finding.flops = learner.meter.flops - before
    for text, scores in zip(tokens, found, strict=True):
        count = max(1, round(config.fedfed.share * len(text)))
        chosen = np.sort(np.argsort(-scores, kind="stable")[:count])
        picked = [text[place] for place in chosen]
        noised = random.random(count) < config.fedfed.noise
        others = random.integers(0, size, count)
        kept.append(
            [int(o) + t // TYPE * TYPE if n else t for t, n, o in zip(picked, noised, others, strict=True)]
        )
    return kept, labels_of(private), StepRecord.from_json(record).training + finding.cost


def sensitivity(learner: Learner, tokens: Sequence[Tokens], labels: Tensor) -> list[np.ndarray]:
    """Sensitivity of each token: ``|<gradient of the label's loss, embedding>|``, one array per text."""
    found: list[np.ndarray] = []
    taken: list[Tensor] = []

    def keep(module: nn.Module, given: object, embedded: Tensor) -> Tensor:
        taken[:] = [embedded.detach().requires_grad_()]
        return taken[0]

    handle = models.embeddings(learner.model).register_forward_hook(keep)
    learner.model.eval()
    size, device = learner.session.config.clients.eval_batch_size, next(learner.model.parameters()).device
    try:
        for start in range(0, len(tokens), size):
            batch = tokens[start : start + size]
            ids, mask = (x.to(device) for x in pad(batch, learner.specialist.pad_id))
            logits = learner.model(**inputs(ids), attention_mask=mask).logits.float()
            right = labels[start : start + size].to(device)
            loss = functional.cross_entropy(logits, right, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, taken[0])
            scores = (gradient * taken[0]).sum(-1).abs().detach().cpu().numpy()
            found += [row[: len(text)] for row, text in zip(scores, batch, strict=True)]
            learner.meter.add(*ids.shape, training=True)
    finally:
        handle.remove()
    return found
