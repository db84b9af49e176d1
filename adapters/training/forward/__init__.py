"""How a base model reads examples while a LoRA on it trains: packed in rows, adapted, each id seeing what it may."""
