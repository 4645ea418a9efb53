"""Parameter pytrees: names, lazy tensors, what is known of a tensor, structure checks, task vectors."""
