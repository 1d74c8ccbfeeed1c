"""The protocol between server and clients, independent of the engine that carries it.

The server sends an ``Instruction``, clients answer with a ``Reply``, an engine carries both (``Transport``).
Nothing here knows Flower; nothing that travels is pickled.
"""

from feddistill.federation.protocol import Instruction, Reply, Transport

__all__ = ["Instruction", "Reply", "Transport"]
