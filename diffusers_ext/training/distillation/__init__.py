"""Losses that turn a many-step model into a one- to four-step one, each a file of pure functions, and what trains with them."""
