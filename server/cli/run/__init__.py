"""`mta up`, and each of its parts on its own."""
