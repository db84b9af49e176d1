"""The servers themselves: connections to them, whether their writes last, and what they write to disk."""
