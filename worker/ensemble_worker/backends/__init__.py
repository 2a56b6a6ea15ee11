"""One module a model format: load a file that was inspected first, run it on a batch of tensors."""
