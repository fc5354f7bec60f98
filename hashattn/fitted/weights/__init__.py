"""Fitted encoders that come with the library: a folder each, as save_pretrained() writes them."""
