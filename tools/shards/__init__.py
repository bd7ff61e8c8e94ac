"""Making input shards, and proving them sound."""
