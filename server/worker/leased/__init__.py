"""A job in training while its lease holds: the lease itself, the thread under watch, and how far it is."""
