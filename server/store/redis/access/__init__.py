"""Who may call, and how much, on Redis: API keys and what limits count."""
