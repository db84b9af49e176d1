"""`mta bench`."""
