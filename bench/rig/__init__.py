"""What benchmarks and tests are built on: tiny models, made-up people, and real processes around them."""
