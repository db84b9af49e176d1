"""Tenants: API keys, limits, and the keys of their users."""
