"""One module a dialect, and the only places besides `wire` that see protobuf."""
