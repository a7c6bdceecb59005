"""Official metrics as pure functions: records in, numbers out."""
