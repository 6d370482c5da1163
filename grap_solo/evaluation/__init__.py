"""Metrics of a backbone: online, while it trains, and offline, of its frozen embeddings."""
