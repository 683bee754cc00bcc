"""Logs, metrics and the ops HTTP port."""
