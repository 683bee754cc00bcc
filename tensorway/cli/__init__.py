"""The `tensorway` command."""
