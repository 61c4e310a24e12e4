"""Semantic synthesis of abdominal CT: what the bundles share. A bundle sees this package as its `scripts`."""
