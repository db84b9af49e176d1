"""What benchmarks and tests put together to measure: tiny models, made-up people, and real processes around them."""
