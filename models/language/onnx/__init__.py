"""The decoder of the device, in ONNX Runtime."""
