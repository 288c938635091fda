"""Chats in a store: rows against their records, and their turns."""
