"""What a model can do without, for good: decoder layers; and what every smaller model promises."""
