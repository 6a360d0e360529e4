"""Per-head configurations: reading, writing, and (later) searching them."""
