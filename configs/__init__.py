"""Experiments: one file per training stage, `get_config(variant)`; `:tiny` runs on a laptop, the paper's sizes on TPU or GPU."""
