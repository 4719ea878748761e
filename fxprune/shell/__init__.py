"""The commands: what people type, what they are shown."""
