"""The plumbing of HTTP: bodies, middleware, server-sent events, clients that leave."""
