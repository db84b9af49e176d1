"""What runs: `mta up`, and each of its parts by itself."""
