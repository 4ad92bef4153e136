"""The link to the cloud: the only users of gRPC on the device."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # or gRPC writes OpenSSL's words to stderr at every attempt to connect
