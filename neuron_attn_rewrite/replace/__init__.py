"""The kernel calls take over from the attentions."""
