"""Log records to dashboards, curves, the summary and the model card."""
