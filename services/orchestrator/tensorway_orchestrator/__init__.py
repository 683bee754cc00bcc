"""The orchestrator: queues, batches and routes requests, and retries lost attempts. Imports neither torch nor numpy."""
