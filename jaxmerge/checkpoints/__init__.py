"""Opening and saving checkpoints: safetensors, Orbax and npz; local paths and URLs."""
