"""The clients of the engines."""
