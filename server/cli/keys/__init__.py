"""`mta keys`: who may call a gateway, and for what."""
