"""What the records of an evaluation come to: metrics, intervals, tables, pictures, files."""
