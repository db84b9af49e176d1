"""What is made of an evaluation's records: metrics, intervals, tables, pictures, files."""
