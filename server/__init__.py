"""The server: the gateway, the plugin that runs inside vLLM, the command line and what starts it all."""
