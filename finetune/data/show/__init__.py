"""What a user looks at before training: the summary, the preview page, one row's fate."""
