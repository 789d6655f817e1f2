"""What the rest is written against: standard library, numpy and pydantic; no torch, no onnx."""
