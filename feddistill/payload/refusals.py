"""Why a payload is refused: one class for each reason, so that a server can count them."""

import reprlib

from feddistill.errors import PayloadError


class Refusal(PayloadError):
    """A payload was refused; names client, round, field, what was required and what was given."""

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
    """The envelope is not the JSON object that it must be."""


class UnknownClient(Refusal):
    """The client's name is not a name, or the round does not know it."""


class MissingSignature(Refusal):
    """The round enrolled keys, and the envelope is not signed."""


class BadSignature(Refusal):
    """The envelope is not signed with the key that the round enrolled for its client."""


class Expired(Refusal):
    """The envelope may not be used any more."""


class WrongRun(Refusal):
    """Made for another run."""


class WrongRound(Refusal):
    """Made for another round of this run: late, or replayed."""


class SecondSubmission(Refusal):
    """This client has already answered this round."""


class DigestMismatch(Refusal):
    """The bytes are not those that the envelope vouches for."""


class Truncated(Refusal):
    """Fewer bytes than the file says that it has."""


class ExtraBytes(Refusal):
    """More bytes than the file says that it has."""


class HeaderTooLarge(Refusal):
    """The header is over its limit."""


class MalformedHeader(Refusal):
    """The header is not the JSON object that it must be, or names something twice."""


class WrongTensors(Refusal):
    """A tensor is missing or unknown, empty, overlaps another or leaves a gap."""


class WrongShape(Refusal):
    """A tensor has another type or shape than the round asks for."""


class MalformedFrame(Refusal):
    """What should be a zstd frame is none, is several, or asks for more than a reader has to give."""


class WrongContentSize(Refusal):
    """A zstd frame declares, or holds, another size than the round asks for: a bomb, for one."""


class NotCanonical(Refusal):
    """The file says what it should in other bytes than the one encoding's."""


class WrongMetadata(Refusal):
    """A metadata field is missing, unknown or not what the round asks for."""


class WrongVocabulary(WrongMetadata):
    """Answers over other classes or another tokenizer."""


class WrongQuestion(WrongMetadata):
    """Answers to another proxy set, or to a request that was changed on the way."""


class WrongNonce(WrongMetadata):
    """Made before this round's request was sent: a replay."""


class IdOutOfRange(Refusal):
    """An id is not below the vocabulary's size."""


class IdRepeated(Refusal):
    """An id stands twice in a row."""


class NotInOrder(Refusal):
    """Values are not in rank order, likeliest first."""


class WrongLength(Refusal):
    """A row keeps no id, or more than there is room for."""


class BelowThreshold(Refusal):
    """A row keeps an id that is less likely than the round asks for."""


class WrongPadding(Refusal):
    """What fills a row up is not what the format says."""


class WrongDraws(Refusal):
    """A row's counts do not add up to the draws."""


class WrongMass(Refusal):
    """A row's probabilities do not add up to one."""


def _short(value: object, limit: int = 120) -> str:
    """What came from outside is shown escaped and cut; ``reprlib`` bounds depth and size before that."""
    text = value if isinstance(value, str) else _SHOWN.repr(value)
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 3] + "..."


_SHOWN = reprlib.Repr()
_SHOWN.maxdict = _SHOWN.maxlist = _SHOWN.maxstring = 20
