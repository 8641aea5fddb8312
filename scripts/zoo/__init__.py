"""The zoo: every model type of the installed transformers, tiny and random, adapted and judged."""
