"""Where adaptors go, and how they fold away."""
