"""Speed and memory of the model's steps, alone and against PyTorch; see `__main__`."""
