"""Find, download or create the folders of the base model and the embedder."""
