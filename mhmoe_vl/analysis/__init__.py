"""What a person looks at after training: the run's report and where the experts' rows come from."""
