"""A rank's training state: model chunks, data-parallel wrapping, AdamW, average of weights."""

# What Adam keeps of a parameter beside its fp32 master; the names are torch's.
MOMENTS = ("exp_avg", "exp_avg_sq")
SQUARES = "exp_avg_sq"  # the one of them that is never below 0

# What checkpoints call the average of a weight.
AVERAGE = "ema"
