"""What observes a server in tests: a real Prometheus, a trace collector."""
