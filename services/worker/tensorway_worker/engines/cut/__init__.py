"""Cutting a model: which layers a rank holds, which slices of their tensors, and how only those are read."""
