"""Backend `tensorrt`: a network of TensorRT's native layers a rank, with its all-reduces inside."""
