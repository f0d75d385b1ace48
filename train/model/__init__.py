"""The model, copied verbatim into every hub folder."""
