"""What goes into a model and what comes out: padding, packing, windows over passages, outputs, inference."""
