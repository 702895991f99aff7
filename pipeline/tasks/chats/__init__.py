"""Chats as rows: rendered by the tokenizer's template, with the turns of the assistant marked."""

from pipeline.tasks.chats.render import check_chat_settings, render_chat, render_prompt, settle, supervision

__all__ = ["check_chat_settings", "render_chat", "render_prompt", "settle", "supervision"]
