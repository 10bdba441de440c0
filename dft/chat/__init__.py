"""Turn a conversation into token ids and labels."""
