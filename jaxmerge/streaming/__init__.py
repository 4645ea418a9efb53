"""From disk to disk: merging and saving lazy tensors within a memory budget."""
