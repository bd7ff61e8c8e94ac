"""The teacher's pass: from shards to a sealed store."""
