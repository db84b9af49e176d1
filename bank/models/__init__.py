"""The base model and the embedder as folders on this machine: found, fetched or made."""
