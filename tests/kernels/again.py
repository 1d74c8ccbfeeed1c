"""More than one backward pass through one graph."""

import torch


def backward_again_and_again(loss, leaves, once):
    """Three times, between which somebody writes to what was handed out; then three times to sum up."""
    for _ in range(3):
        for given, true in zip(torch.autograd.grad(loss, leaves, retain_graph=True), once, strict=True):
            torch.testing.assert_close(given, true)
            given.mul_(7)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, true in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * true)
