"""A rank: the process that holds a model, or a part of it."""
