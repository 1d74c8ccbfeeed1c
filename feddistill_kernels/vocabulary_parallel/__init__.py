"""The losses of ``distillation`` where every rank of a process group holds some columns of the logits.

Two collectives a call, each a few numbers a row: the statistics of every rank's columns, from which each
has the normalisers of whole rows, and its share of the divergence.  Gradients need none.
"""
