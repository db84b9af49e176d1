"""LoRA values: recipes, rows on disk, fusion and training. Importing this package imports no torch."""
