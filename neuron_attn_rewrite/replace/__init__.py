"""Replaces attentions: kernel calls are added beside them, compared with them, and take over if they agree."""
