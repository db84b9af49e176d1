"""How the server is watched: Prometheus, its alerts, a Grafana dashboard, and pictures of traces and figures."""
