"""Model inputs and outputs: padding, packing, windows over passages, hidden states, inference."""
