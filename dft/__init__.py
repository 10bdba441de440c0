"""The trainer's parts, in rooms that follow a row's way: reading, chat, data, batching, loss, metrics, tracking."""
