"""One job from open to close, and the stages between."""
