"""What a cache is made of: rows, records, shards and their manifest."""
