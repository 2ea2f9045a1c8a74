"""The runtime over HTTP and server-sent events, in the protocol of OpenCode's clients.

serve.py      ``understudy serve``: from settings to a listening server and its orderly end
app.py        the table of endpoints, and what surrounds every call
gateway.py    what all calls share
call.py       one request: its path, its query, its directory, its checked body
access.py     who may call: password, origins, host names
errors.py     errors in the shapes clients expect
wire.py       records and events in OpenCode's shapes
events.py     one subscription, fanned out to bounded connections
sessions.py, prompts.py, asks.py, catalog.py, supervision.py    the endpoints
tools.py, builtin.py, commands.py    what sessions work with
openapi.py    the document at ``/doc``
"""
