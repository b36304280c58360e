"""What several rooms need and no reader looks for: tables, atomic files, texts, intervals."""
