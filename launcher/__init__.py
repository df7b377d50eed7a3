"""Starts and supervises the router and the shards."""
