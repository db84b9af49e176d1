"""The API process: a recipe is checked, named and its user adapter fetched before vLLM admits the request."""
