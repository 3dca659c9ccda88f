"""The doors beside `rewrite`: torch.compile, torch_neuronx.trace and Hugging Face."""
