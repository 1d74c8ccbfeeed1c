"""The reasons for refusing a payload: one class each, so that a server can count them."""

import reprlib

from feddistill.errors import PayloadError


class Refusal(PayloadError):
    """A payload was refused; the message has client, round, field, the required and the given value."""

    def __init__(self, client: str, round_: int, field: str, required: object, given: object):
        self.client, self.round, self.field = client, round_, _short(field)
        self.required, self.given = _short(required), _short(given)
        reason = type(self).__name__
        super().__init__(
            f"{client}, round {round_}: {self.field} must be {self.required}, got {self.given} ({reason})"
        )


class TooLarge(Refusal):
    """More bytes than any honest answer to this round can have."""


class MalformedEnvelope(Refusal):
    """The envelope is not canonical JSON with the required fields."""


class UnknownClient(Refusal):
    """The client's name is invalid or not enrolled in the round."""


class MissingSignature(Refusal):
    """The round enrolled keys, but the envelope is not signed."""


class BadSignature(Refusal):
    """The envelope is not signed with the key that is enrolled for its client."""


class Expired(Refusal):
    """The envelope has expired."""


class WrongRun(Refusal):
    """Made for another run."""


class WrongRound(Refusal):
    """Made for another round of this run: late or replayed."""


class SecondSubmission(Refusal):
    """This client has already answered this round."""


class DigestMismatch(Refusal):
    """The hash of the bytes is not that of the envelope."""


class Truncated(Refusal):
    """Fewer bytes than declared."""


class ExtraBytes(Refusal):
    """More bytes than declared."""


class HeaderTooLarge(Refusal):
    """The header is larger than its limit."""


class MalformedHeader(Refusal):
    """The header is not a JSON object of the required form, or has a duplicate key."""


class WrongTensors(Refusal):
    """A tensor is missing, unknown or empty, overlaps another or leaves a gap."""


class WrongShape(Refusal):
    """A tensor has another type or shape than the request."""


class MalformedFrame(Refusal):
    """The content is not exactly one zstd frame, or needs more than the limits of the format."""


class WrongContentSize(Refusal):
    """A zstd frame declares or has another content size than the request, e.g. a decompression bomb."""


class NotCanonical(Refusal):
    """Valid content in another than its canonical encoding."""


class WrongMetadata(Refusal):
    """A metadata field is missing, unknown or differs from the request."""


class WrongVocabulary(WrongMetadata):
    """Answers over other classes, or with another tokenizer."""


class WrongQuestion(WrongMetadata):
    """Answers to another proxy set or a modified request."""


class WrongNonce(WrongMetadata):
    """Made before this round's request was sent: a replay."""


class IdOutOfRange(Refusal):
    """An id is not below the vocabulary's size."""


class IdRepeated(Refusal):
    """A row contains an id twice."""


class NotInOrder(Refusal):
    """Ids or codes are not in the required order."""


class WrongLength(Refusal):
    """A row keeps no id, or more than ``k``."""


class BelowThreshold(Refusal):
    """A row keeps an id with a code above the request's ``max_code``."""


class WrongPadding(Refusal):
    """The padding of a row is not that of the format."""


class WrongDraws(Refusal):
    """The counts of a row do not sum to the draws."""


class WrongMass(Refusal):
    """The probabilities of a row do not sum to one."""


def _short(value: object, limit: int = 120) -> str:
    """A given value, escaped and truncated; ``reprlib`` bounds depth and size before that."""
    text = value if isinstance(value, str) else _SHOWN.repr(value)
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 3] + "..."


_SHOWN = reprlib.Repr()
_SHOWN.maxdict = _SHOWN.maxlist = _SHOWN.maxstring = 20
