"""The link to the cloud: the only users of gRPC on the device."""
