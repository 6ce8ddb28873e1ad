"""Base, adapter, tokenizer and merged model, from local folders."""
