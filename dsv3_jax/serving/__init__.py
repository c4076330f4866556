"""Text in and out of the engine: chat templates, streaming, tool calls, grammars, and an OpenAI-compatible server."""
