"""The job behind `prepare`: sources -> store."""
