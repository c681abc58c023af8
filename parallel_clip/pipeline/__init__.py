"""Pipeline schedules: a step's two passes, and their orders and times by arithmetic."""
