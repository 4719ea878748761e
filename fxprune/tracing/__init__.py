"""From the model that people hold to a graph that can be trusted."""
