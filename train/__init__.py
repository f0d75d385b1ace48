"""train: a token store in, a foundation model of the brain out."""
