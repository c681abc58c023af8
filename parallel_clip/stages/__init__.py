"""Which layers of both towers lie on which pipeline stage, and what they cost. No torch."""
