"""A rank's training state: model chunks, data-parallel wrapping, AdamW."""

# What Adam keeps of a parameter beside its fp32 master; the names are torch's.
MOMENTS = ("exp_avg", "exp_avg_sq")
