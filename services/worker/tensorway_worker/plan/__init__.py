"""`python -m tensorway_worker.plan`: how a model would be cut, without starting anything. What `tensorway plan` shows."""
