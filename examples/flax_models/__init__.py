"""Plain Flax models under the names that `jm.naming` gives: Llama, Qwen and Gemma decoders, a vision transformer."""
