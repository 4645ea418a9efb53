"""The demo: real images, a small vision transformer, five experts, and every merge method, from disk to disk."""
