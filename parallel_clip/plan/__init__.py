"""What a layout costs, found by running the trainer's own code without its tensors."""
