"""Token generation: continuous batching over the ranks of a group."""
