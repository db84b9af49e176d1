"""Clients of the engines."""
