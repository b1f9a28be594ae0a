"""Parts of `probe`: the output head, its losses, second moment and gradient sketches."""
