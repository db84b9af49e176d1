"""The gateway: takes requests, finds who speaks for a user, asks an engine. No torch, no vLLM, no state."""
