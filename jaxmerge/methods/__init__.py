"""Merge methods, their stages and measurements, and `merge`."""
