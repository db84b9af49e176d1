"""Whether a level of personalisation is worth it: some users are answered one level lower, and outcomes compared."""
