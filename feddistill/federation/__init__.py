"""A federation without a network: who asks whom for what, whatever carries it.

The server asks (``Task``), clients answer (``Reply``), an engine carries both (``Transport``). Nothing here
knows Flower; nothing that travels is pickled.
"""

from feddistill.federation.protocol import Reply, Task, Transport

__all__ = ["Reply", "Task", "Transport"]
