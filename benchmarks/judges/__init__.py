"""What fxprune is judged by: the same effect had in another way, the published losses, other people's networks."""
