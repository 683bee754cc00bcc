"""The worker: a node that starts, watches and restarts groups of rank processes. The node itself never imports torch; its ranks do."""
