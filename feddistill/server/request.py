"""The request of a round."""

from feddistill import payload
from feddistill.config import digest
from feddistill.seeds import derive
from feddistill.tasks.session import Session
from feddistill.types import RoundSpec


def request(session: Session, number: int, *, quorum: int, previous: str) -> RoundSpec:
    """The request of a round; ``previous`` is the head of the ledger.

    A run has the same id as another with the same settings: payloads of equal runs are equal to the byte.
    """
    config, splits, settings = session.config, session.splits, session.config.payload
    question = session.query
    classes = question.vocab_size
    k = {"dense": classes, "sampled": min(settings.samples, classes)}.get(settings.codec, settings.k)
    run_id, asked = digest(config)[:16], session.round_clients(number)
    keys = getattr(config.data.partition, "keys", {})
    spec = RoundSpec(
        run_id=run_id,
        round=number,
        proxy_digest=splits.proxy.digest(),
        positions=question.positions,
        vocab_size=classes,
        vocab_fingerprint=question.fingerprint,
        codec=settings.codec,
        k=k,
        nonce=f"{derive(config.seed, run_id, 'nonce', number):08x}",
        quorum=quorum,
        clients=asked,
        keys=tuple((name, keys[name]) for name in asked if name in keys),
        compression=settings.compression,
        max_code=payload.max_code_of(settings.epsilon) if settings.codec == "threshold" else 255,
        draws=settings.samples if settings.codec == "sampled" else 0,
        previous=previous,
    )
    return payload.split(spec, int(settings.shard_mib * 2**20))
