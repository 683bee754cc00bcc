"""Who calls, and what they may do: API keys, JSON Web Tokens, client certificates, quotas, and the audit log."""
