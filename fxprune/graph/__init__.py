"""FX graphs: how they are called, what their nodes compute, their shapes, their parts."""
