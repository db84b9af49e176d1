"""Pictures of the metrics and traces of a real run."""
