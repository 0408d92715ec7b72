"""PyTorch definitions of the ops: what every other backend is tested against."""
