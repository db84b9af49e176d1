"""Observability: Prometheus, its alerts, a Grafana dashboard."""
