"""The losses of ``distillation`` if every rank of a process group holds some columns of the logits.

Three collectives a call: the sizes of the shards; the statistics of every rank's columns, from which each has
the normalisers of whole rows; every rank's share of the divergence.  Gradients need none.
"""
