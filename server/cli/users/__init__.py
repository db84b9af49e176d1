"""Commands that operators run on users."""
