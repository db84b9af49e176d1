"""Observability: Prometheus, its alerts, a Grafana dashboard, and pictures of traces and metrics."""
