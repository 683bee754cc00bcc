"""Who may do what: the access file, its permissions and its API keys. The gateway applies them; the command line writes them."""
