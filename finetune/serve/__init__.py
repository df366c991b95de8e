"""Talks to what was trained: a chat in the terminal, and a server with OpenAI's API.

Example::

    serve(Path("outputs/mine"), ServeConfig(port=8000))
    chat(Path("outputs/mine"), ChatSettings(compare=True))
"""

from finetune.serve.chat import ChatSettings, chat
from finetune.serve.config import ServeConfig
from finetune.serve.run import serve

__all__ = ["ChatSettings", "ServeConfig", "chat", "serve"]
