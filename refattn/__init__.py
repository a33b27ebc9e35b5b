"""refattn: linear and causal attention, each form proved equal to its definition."""
