"""The contract between processes: messages, settings, image arithmetic."""
