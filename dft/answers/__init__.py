"""Answers to held-out prompts: asked, compared with their references, counted and shown."""
