"""Storage: one class for each kind of data, its encoding, and its implementation on Redis."""
