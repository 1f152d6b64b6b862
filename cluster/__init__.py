"""Hosts: everything that knows Ray and storage. Never imports torch or transformers."""
