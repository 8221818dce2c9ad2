"""One codec for every rate: a grid of any step, trained at several λ at once."""
