"""An OpenAI-compatible server over the engine, and the command `generate`.

`chat` renders templates, `assistant` and `tools` parse the output, `grammar` constrains it, `detokenize` streams it.
`server` is the HTTP interface; `completions` and `chat_completions` are its main endpoints.
"""
