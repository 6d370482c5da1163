"""Commands that launch runs, train more than once or measure: retrain, compare, search, ..."""
