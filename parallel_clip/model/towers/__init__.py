"""One file a tower: its shape, parameters, costs, embedding, pooling and head."""
