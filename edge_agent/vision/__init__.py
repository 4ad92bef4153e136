"""Photos on the device: head, exits, bottleneck, and the choice of a route."""
