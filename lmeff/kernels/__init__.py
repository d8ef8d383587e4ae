"""Products and attention where XLA's own are not enough, chosen by platform, shape and format."""
