"""Render chats with the tokenizer's chat template and find the text that the assistant writes."""

from pipeline.tasks.chats.render import check_chat_settings, render_chat, render_prompt, settle, supervision

__all__ = ["check_chat_settings", "render_chat", "render_prompt", "settle", "supervision"]
