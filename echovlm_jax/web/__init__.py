"""The page: an exam goes in, a report, a diagnosis and a conversation come out."""
