"""Commands that train more than once, or measure: retrain, compare, search, bench and demo."""
