"""Checkpoints in parameter space: written from any layout, read by any other.

A checkpoint is a folder:

    meta.json           step, position in the data order, model config, preprocessing
    index.json          for each tensor: its full shape, and the file and place of each piece
    rank_*.safetensors  pieces of fp32 weights and of Adam's two moments

Tensors have the names and full shapes of an OpenCLIP state dict; a piece is a range along one axis.
"""
