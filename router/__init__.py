"""HTTP requests in, steps for the shards out."""
