"""The one scoring function: a query's prefix once, its items packed beside it, label logits out."""
