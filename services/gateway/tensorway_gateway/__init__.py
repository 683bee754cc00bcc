"""The gateway: the mesh's door. It parses a dialect, checks the request against the model's signature, and hands it to an orchestrator."""
