"""Evaluates a backbone: online while it trains, and offline on its frozen embeddings."""
