"""Graph passes: one file a pass, each an onnx_ir model in and a PassResult out."""
