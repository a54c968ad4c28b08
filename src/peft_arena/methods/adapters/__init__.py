"""Methods that add small networks or factors between the layers."""
