"""The device's decoder, in ONNX Runtime."""
