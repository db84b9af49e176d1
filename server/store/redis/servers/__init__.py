"""Connections to Redis servers, the durability of their writes, and rewrites of their files."""
