"""Networks that teach themselves and each other while they are trained."""
