"""What is kept: a port for each kind of data, its values as bytes, and its implementation on Redis."""
