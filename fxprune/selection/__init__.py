"""Which regions to drop: plans, and how they grow."""
